"""Serving: the HTTP application with the OpenAI routes and a page."""
