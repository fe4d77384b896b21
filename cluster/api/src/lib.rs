//! What users and tools see: specs, views, errors, client.
