"""Models of other libraries: recognise their routers, read what they return, and hook them."""
