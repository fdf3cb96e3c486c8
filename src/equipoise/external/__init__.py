"""Models of other libraries: recognize their routers, read what they return, and balance them with hooks."""
