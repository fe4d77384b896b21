//! Headers of vsock packets (virtio 1.3 section 5.10.6).

use super::chain::{ChainError, Reader};

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The same as used lengths are counted.
pub const HEADER_LENGTH: u32 = 44;
/// Context id of the host (virtio 1.3 section 5.10.4).
pub const HOST_CID: u64 = 2;
/// The only type of socket we know.
pub const TYPE_STREAM: u16 = 1;
/// `SHUTDOWN`: the sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `SHUTDOWN`: the sender sends no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Open a stream.
    Request,
    /// A stream is open.
    Response,
    /// There is no such stream, or no more.
    Reset,
    /// The sender does no more of what the flags say.
    Shutdown,
    /// Bytes of the stream.
    Data,
    /// Only tells the credit.
    CreditUpdate,
    /// Asks for the credit.
    CreditRequest,
    /// A number that is none of these.
    Unknown(u16),
}

impl Operation {
    fn from_number(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// A header, copied from the guest once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub source_cid: u64,
    /// Context id of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes of payload.
    pub length: u32,
    /// Type of socket.
    pub kind: u16,
    /// What it is about.
    pub operation: Operation,
    /// Flags of the operation.
    pub flags: u32,
    /// Bytes the sender has room for.
    pub buffer_size: u32,
    /// Bytes the sender ever took out of that room, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// The chain is too short.
    pub fn read(reader: &mut Reader<'_>) -> Result<Self, ChainError> {
        // Copied first, then taken apart: the guest may write meanwhile.
        let bytes: [u8; HEADER] = reader.read_array()?;
        let mut rest = bytes.as_slice();
        Ok(Self {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            destination_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            destination_port: u32::from_le_bytes(take(&mut rest)),
            length: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            operation: Operation::from_number(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buffer_size: u32::from_le_bytes(take(&mut rest)),
            forwarded: u32::from_le_bytes(take(&mut rest)),
        })
    }

    /// The header as bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        [
            self.source_cid.to_le_bytes().as_slice(),
            &self.destination_cid.to_le_bytes(),
            &self.source_port.to_le_bytes(),
            &self.destination_port.to_le_bytes(),
            &self.length.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.operation.number().to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buffer_size.to_le_bytes(),
            &self.forwarded.to_le_bytes(),
        ]
        .concat()
    }

    /// The answer to a packet for which there is no stream.
    pub fn reset_for(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            length: 0,
            kind: self.kind,
            operation: Operation::Reset,
            flags: 0,
            buffer_size: 0,
            forwarded: 0,
        }
    }
}

/// Takes `N` bytes from the front; zeroes behind the end.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((front, behind)) => {
            *rest = behind;
            *front
        }
        None => [0; N],
    }
}
