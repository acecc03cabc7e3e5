"""Rollouts from q* inside trainers; each module knows one trainer, and imports it only where it is used."""
