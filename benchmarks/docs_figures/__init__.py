"""The measured tables and plots of README and docs: a file for each page, a function for each table."""
