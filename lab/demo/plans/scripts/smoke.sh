#!/bin/sh
# A smoke test, as a plan runs it on a worker: context comes as FARSHORE_… variables and as JSON on standard input.
set -eu
context=$(cat)
echo "smoke test of $1 ($FARSHORE_KIND): $(printf '%s' "$context" | tr -cd ',' | wc -c | tr -d ' ') fields of context read"
