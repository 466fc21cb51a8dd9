//! The entry of a Baton cluster: takes OpenAI requests, schedules and streams them.
