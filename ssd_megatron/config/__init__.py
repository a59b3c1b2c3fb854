"""The config room: one ds.json, checked as a whole before anything is built."""
