"""How reports are shown: tables, pictures and one HTML page."""
