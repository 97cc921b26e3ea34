"""What a client meets: routes, bodies, answers."""
