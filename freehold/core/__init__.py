"""What every room needs: errors, log, config, artifacts, documents. Never imports torch."""
