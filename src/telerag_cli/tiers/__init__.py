"""Fast memory: accounting (arena, residency) and transport (how bytes get there), apart."""
