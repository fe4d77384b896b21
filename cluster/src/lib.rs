//! The unprivileged cluster process: Raft state, API, plans.
