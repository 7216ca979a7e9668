"""The jobs API: FastAPI over JobService."""
