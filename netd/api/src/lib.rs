//! What the agent may ask of netd: networks and nics, by three verbs (ensure, remove, list).
//!
//! Every request is idempotent: ensuring what exists as specified changes nothing, ensuring what exists otherwise
//! repairs it, removing what does not exist is done. netd keeps no state of its own; what it lists is read from the kernel.
//!
//! * [`spec`]: what a network and a nic shall be
//! * [`request`]: requests and replies
//! * [`client`]: typed calls for the agent
#![forbid(unsafe_code)]

pub mod client;
pub mod request;
pub mod spec;

pub use client::{NetdClient, NetdError};
pub use request::{Inventory, Problem, ProblemKind, Reply, Request};
pub use spec::{NetworkSpec, NicId, NicSpec, Subnet};
