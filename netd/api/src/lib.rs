//! What the agent may ask of netd: networks and nics.
