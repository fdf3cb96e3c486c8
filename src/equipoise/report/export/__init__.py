"""Reports as files and in other programs: pages, CSV, PNG, SVG and figures in a notebook."""
