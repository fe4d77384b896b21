//! Changes as they happen.

use serde::{Deserialize, Serialize};

use crate::vm::VmView;

/// One line of a watch. Lines come in order of revision, none is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Revision after the change; continue with `?after=` this.
    pub revision: u64,
    /// What happened.
    pub change: Change,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A VM was created or changed; how it is now.
    Vm(Box<VmView>),
    /// A VM is gone.
    VmGone {
        /// Its project.
        project: String,
        /// Its name.
        name: String,
        /// Its identity.
        id: blixard_vmm_api::VmId,
    },
    /// Nothing; the connection lives (at least every 15 s).
    Beat,
}
