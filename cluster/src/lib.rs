//! `blixard-node`: the cluster process of a node, without privileges.
//!
//! | part | does | woken by |
//! |---|---|---|
//! | [`api`] | answers users: checks, proposes, waits, streams | requests |
//! | [`raft`] | makes commands durable and agreed, then applies them | proposals |
//! | [`state`] | what is agreed: pure commands on records | applied entries |
//! | [`auth`] | keys and certificates of nodes, tokens of users | changes of trust, time |
//! | [`scheduler`] | where VMs go: pure | requests, lost nodes, drains |
//! | [`liveness`] | which nodes live, leases: pure | heartbeats, the clock |
//! | [`host`] | sends this node's plan to its agent, brings reports back | each applied entry, each report |
//! | [`upkeep`] | what the leader does by itself: placements, drains, restarts | each applied entry, the clock |
//! | [`images`] | imports images and kernels, keeps content by digest | uploads |
//! | [`node`] | builds all of these and ends them | the start, signals |
//!
//! Nothing here touches a device, another user's process or the network configuration: that is the agent's work, and
//! the agent is asked over one Unix socket in the words of `blixard_agent_api`.
#![forbid(unsafe_code)]

pub mod api;
pub mod auth;
pub mod clock;
pub mod config;
pub mod host;
pub mod images;
pub mod liveness;
pub mod metrics;
pub mod node;
pub mod raft;
pub mod scheduler;
pub mod state;
pub mod upkeep;
pub mod vm_metrics;
pub mod watch;
