"""How is a notebook executed? Parameters are checked, papermill runs it, many run at once, progress is shown."""
