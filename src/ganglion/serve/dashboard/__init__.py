"""Dashboard: the page for operators, its live feed, and the robots' side channel into it.

Mounted by `serve.app` through `routes.dashboard_routes`. Knows the Service seam and the hub only.
"""
