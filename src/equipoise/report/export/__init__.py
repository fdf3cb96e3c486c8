"""The report's parts for other programs: tables, pictures, figures in a notebook."""
