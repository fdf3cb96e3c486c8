"""Reports as files and in other programs: pages, CSV, PNG and figures in a notebook."""
