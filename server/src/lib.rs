//! A Baton instance: executes the model, hands KV caches on or takes them up.
