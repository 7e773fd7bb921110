"""What an adapter's files hold, and whether they can be believed."""
