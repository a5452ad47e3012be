"""The catalog's schema, revision by revision (Alembic). Run by store.catalog, never by hand."""
