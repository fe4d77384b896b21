//! Where VMs go. Pure: no clock, no randomness, no I/O; see `README.md` in this folder for the problem and its limits.
//!
//! * [`model`]: nodes, VMs, requests and decisions
//! * [`view`]: the cluster with indexes, kept up to date VM by VM; a clone is a snapshot
//! * [`mod@place`]: filters, scores, the search, and the explanation
//! * [`preempt`]: who makes room
//! * [`cluster`]: the view of the replicated state

pub mod cluster;
pub mod model;
pub mod place;
pub mod preempt;
pub mod view;

pub use model::{Data, Decision, Explanation, NodeInfo, Placed, Reason, Request, Resource, Size};
pub use place::{explain, place, refuses};
pub use view::View;
