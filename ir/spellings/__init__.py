"""The ways in which models write one operation, a family a file: rules that replace each by one operator."""
