#!/bin/sh
# Prepare a Temporal cluster for Farshore: the namespace and the search attributes. Safe to repeat.
#
# A workflow that sets an unknown search attribute retries its task for ever, so workers start after this has ended.
# Environment: TEMPORAL_ADDRESS (the temporal command reads it), NAMESPACE, RETENTION (days that closed runs are kept,
# for a new namespace), DEADLINE (seconds to wait for the cluster).
set -eu

: "${NAMESPACE:=default}" "${RETENTION:=90d}" "${DEADLINE:=120}"

waited=0
until temporal operator cluster health >/dev/null 2>&1; do
    if [ "$waited" -ge "$DEADLINE" ]; then
        echo "the Temporal cluster at ${TEMPORAL_ADDRESS:-localhost:7233} is not healthy after $DEADLINE s:" >&2
        temporal operator cluster health >&2
        exit 1
    fi
    sleep 1
    waited=$((waited + 1))
done

if ! temporal operator namespace describe --namespace "$NAMESPACE" >/dev/null 2>&1; then
    temporal operator namespace create --namespace "$NAMESPACE" --retention "$RETENTION"
fi

# A new namespace reaches the caches of the frontend after some seconds: repeat until it does. An attribute that exists
# with the same type is not an error to the server.
waited=0
until temporal operator search-attribute create --namespace "$NAMESPACE" \
    --name FarshorePlan --type Keyword \
    --name FarshoreKind --type Keyword \
    --name FarshoreMachine --type Keyword \
    --name FarshoreState --type Keyword \
    --name FarshoreSite --type Keyword; do
    if [ "$waited" -ge "$DEADLINE" ]; then
        echo "search attributes could not be registered within $DEADLINE s" >&2
        exit 1
    fi
    sleep 1
    waited=$((waited + 1))
done
echo "namespace $NAMESPACE is ready for Farshore"
