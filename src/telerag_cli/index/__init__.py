"""The IVF index on disk: layout, building, opening, checking, scoring by Faiss."""
