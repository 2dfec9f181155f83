#!/bin/sh
# Runs on a worker after the last group has started. Farshore gives the run in FARSHORE_… variables and as JSON on
# standard input; a status other than 0 is a failed action. Put the checks of your own application here.
set -eu
: "${FARSHORE_RUN:?this script is started by a run of a recovery plan}"
cat >/dev/null
echo "smoke test of ${1:-$FARSHORE_PLAN}: ${FARSHORE_KIND:-unknown} run $FARSHORE_RUN has started all groups"
