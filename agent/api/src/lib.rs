//! What the node may ask of the agent: plans, reports and a few requests.
//!
//! The node sends the whole [`HostPlan`]; the agent makes the host look like it and answers with a [`HostReport`] of what
//! is there. A plan is wanted state, so sending it again is harmless; a plan with a lower generation than the stored one is
//! refused. The agent works on while nobody asks, and never calls up: who wants news sends [`Request::Observe`].
//!
//! * [`blob`]: content by digest (images, kernels, initramfs)
//! * [`plan`]: everything a host needs, nothing it has to ask back
//! * [`report`]: what a host does run
//! * [`request`]: requests and replies
//! * [`held`]: what the node says of its lease besides, in a file
//! * [`client`]: typed calls for the node
#![forbid(unsafe_code)]

pub mod blob;
pub mod client;
pub mod held;
pub mod plan;
pub mod report;
pub mod request;

pub use blob::{BlobRef, Digest};
pub use client::{AgentClient, AgentError};
pub use held::HeldLease;
pub use plan::{Epoch, Generation, HostPlan, Run, Start, VmPlan, VolumePlan};
pub use report::{HostReport, Phase, VmReport};
pub use request::{Finding, Problem, ProblemKind, Reply, Request};
