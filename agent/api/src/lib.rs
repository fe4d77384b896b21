//! What the node may ask of the agent: plans, reports and a few requests.
