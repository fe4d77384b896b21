//! The privileged hand of one node.
//!
//! ```text
//!            plan                                   report
//! node ───────────────► server ──► host ◄────────── server ───► node
//!                                  │  ▲
//!                       reconcile: which VMs have steps
//!                                  │  │ what is there now
//!                                  ▼  │
//!            steps (pure) ──► execute one step ──► ledger before and after
//!                                  │
//!       store  volume  cgroup  jail  netd  vmm_link ◄── VMM exits and events
//! ```
//!
//! * [`config`]: paths, uids, where things are
//! * [`server`]: checks the caller, stores the plan, answers with the report
//! * [`host`]: the one state that all threads share, and the report made from it
//! * [`reconcile`]: gives VMs that have something to do to workers; timers
//! * [`steps`], [`record`]: pure: (wanted, known, found) to steps; what the ledger says
//! * [`execute`]: carries out one step
//! * [`ledger`], [`durable`]: what survives this process and a loss of power
//! * [`lease`]: VMs that may run elsewhere are frozen when the lease ends
//! * [`guard`]: the same by a process of its own, for when this one is dead or stopped then
//! * [`observe`]: what is there when the agent starts
//! * [`vmm_link`], [`guest_stream`]: the control connection of each VMM; streams to guests and consoles
//! * [`launch`], [`jail`], [`cgroup`], [`process`]: how a VMM comes to be and is held
//! * [`store`], [`volume`], [`copy`]: content and volumes
//! * [`doctor`]: what the host can do
//! * [`privileges`]: the capabilities that this process keeps

pub mod cgroup;
pub mod config;
pub mod copy;
pub mod doctor;
pub mod durable;
pub mod execute;
pub mod guard;
pub mod guest_stream;
pub mod host;
pub mod jail;
pub mod launch;
pub mod lease;
pub mod ledger;
pub mod observe;
pub mod privileges;
pub mod process;
pub mod reconcile;
pub mod record;
pub mod server;
pub mod steps;
pub mod store;
pub mod vmm_link;
pub mod vmm_stats;
pub mod volume;
