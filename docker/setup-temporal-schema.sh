#!/bin/sh
# Create or update the schemas of Temporal's two databases. Runs in the admin-tools image before the server starts, at
# every start: a database that exists and a schema that is new enough are left alone.
#
# Environment: POSTGRES_HOST, POSTGRES_USER, POSTGRES_PASSWORD_FILE.
set -eu

SQL_PASSWORD=$(cat "$POSTGRES_PASSWORD_FILE")
export SQL_PASSWORD
SCHEMA=/etc/temporal/schema/postgresql/v12

sql_tool() {
    temporal-sql-tool --plugin postgres12 --endpoint "$POSTGRES_HOST" --port 5432 --user "$POSTGRES_USER" "$@"
}

for pair in temporal:temporal temporal_visibility:visibility; do
    database=${pair%%:*}
    schema=${pair##*:}
    echo "schema of $database"
    sql_tool --database "$database" create-database
    sql_tool --database "$database" setup-schema --version 0.0
    sql_tool --database "$database" update-schema --schema-dir "$SCHEMA/$schema/versioned"
done
echo "schemas are up to date"
