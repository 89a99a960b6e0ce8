"""What `deepspec check` checks: it says what holds, what does not, and why."""
