//! Commands of a network card's control queue (virtio 1.3 section 5.1.6.5): what the driver asks for, and the byte that
//! answers it.

use super::chain::{Chain, ChainError};
use super::device::GuestMemory;

/// Classes and commands.
const CLASS_ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

const OK: u8 = 0;
const ERROR: u8 = 1;

/// What a driver can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// The guest has told its neighbours where it is now.
    AnnounceAck,
    /// Use this many pairs of queues.
    Pairs(u16),
    /// Frames to the guest may leave undone what these feature bits say.
    Offloads(u64),
}

impl Command {
    /// Reads the command of a chain; nothing when it is none that we know, or too short.
    pub(super) fn read(chain: &Chain, memory: &GuestMemory) -> Option<Self> {
        let mut reader = chain.reader(memory);
        match reader.read_array().ok()? {
            [CLASS_ANNOUNCE, ANNOUNCE_ACK] => Some(Self::AnnounceAck),
            [CLASS_MQ, MQ_VQ_PAIRS_SET] => reader.read_array().ok().map(u16::from_le_bytes).map(Self::Pairs),
            [CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET] => {
                reader.read_array().ok().map(u64::from_le_bytes).map(Self::Offloads)
            }
            _ => None,
        }
    }
}

/// Answers a command; how many bytes of the chain were filled.
///
/// # Errors
/// The driver left no place for the answer.
pub(super) fn answer(chain: &Chain, memory: &GuestMemory, done: bool) -> Result<u32, ChainError> {
    chain.writer(memory).write(&[if done { OK } else { ERROR }])?;
    Ok(1)
}
