"""HTTP parts that the routes share: bodies, deadlines, downloads and events."""
