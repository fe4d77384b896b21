//! The generation id of a VM: 16 random bytes in guest memory that are new whenever a guest may have been copied or set back
//! in time. Linux reseeds its random number generator when it is told.

use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::devices::ioapic::IoApic;
use crate::layout::{EVENT_PIN, GENERATION};
use crate::virtio::device::GuestMemory;
use crate::virtio::rng;

/// Why there is no new id.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The kernel has no random bytes.
    #[error("generation id: random bytes of the host")]
    Entropy(#[source] io::Error),
    /// Guest memory is too small.
    #[error("generation id")]
    Memory(#[source] GuestMemoryError),
}

/// Gives the VM a new id.
///
/// # Errors
/// There are no random bytes.
pub fn renew(memory: &GuestMemory) -> Result<(), GenerationError> {
    let mut id = [0; 16];
    rng::random(&mut id).map_err(GenerationError::Entropy)?;
    memory.write_slice(&id, GuestAddress(GENERATION.start)).map_err(GenerationError::Memory)
}

/// Tells the guest that the id is new.
pub fn announce(ioapic: &IoApic) {
    ioapic.set_line(EVENT_PIN, true);
    ioapic.set_line(EVENT_PIN, false);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_new_each_time_and_lies_where_the_tables_say() {
        let memory = crate::memory::create(16).unwrap();
        let id = || memory.read_obj::<u128>(GuestAddress(0xE_0030)).unwrap();
        renew(&memory).unwrap();
        let first = id();
        renew(&memory).unwrap();
        assert!(first != 0 && id() != 0 && id() != first);
    }
}
