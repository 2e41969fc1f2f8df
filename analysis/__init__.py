"""What turns results into tables and figures."""
