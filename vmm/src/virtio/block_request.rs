//! A block request as the driver wrote it (virtio 1.3 section 5.2.6), checked against the disk.

use super::backing::SECTOR;
use super::chain::{Chain, ChainError, Reader};
use super::device::GuestMemory;

/// Most ranges of one discard or write-zeroes request.
pub const RANGES_MAX: u32 = 32;
/// Most sectors of one range to discard: 128 MiB.
pub const DISCARD_SECTORS_MAX: u32 = 256 << 10;
/// Most sectors of one range to fill with zeroes, 16 MiB: it may have to be written out.
pub const ZERO_SECTORS_MAX: u32 = 32 << 10;
/// Length of the serial number (virtio 1.3 section 5.2.6.1).
pub const ID_LENGTH: usize = 20;

const HEADER: usize = 16;
const RANGE: usize = 16;

/// The status byte at the end of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// It failed, or it makes no sense on this disk.
    IoError = 1,
    /// Not something this device does.
    Unsupported = 2,
}

/// A range of bytes on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The space may be given back.
    pub unmap: bool,
}

/// What is asked for. Places and lengths are inside the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Read this many bytes from this offset.
    Read(u64, usize),
    /// Write this many bytes to this offset.
    Write(u64, usize),
    /// Make writes durable.
    Flush,
    /// The serial number.
    Id,
    /// Give back space.
    Discard(Vec<Range>),
    /// Make ranges read as zeroes.
    WriteZeroes(Vec<Range>),
}

impl Request {
    /// What it spends of a rate limit: bytes transferred and operations. Of the requests with ranges each range is one.
    pub fn cost(&self) -> (u64, u64) {
        match self {
            Self::Read(_, length) | Self::Write(_, length) => (*length as u64, 1),
            Self::Flush | Self::Id => (0, 1),
            Self::Discard(ranges) | Self::WriteZeroes(ranges) => (0, ranges.len() as u64),
        }
    }
}

/// Why a chain is no request at all: there is no header, or no place for the status.
#[derive(Debug, thiserror::Error)]
pub enum NoRequest {
    /// The readable part is shorter than a header.
    #[error("request header")]
    Header(#[source] ChainError),
    /// Nothing is writable.
    #[error("no place for the status of a request")]
    NoStatus,
    /// A request's data cannot be read.
    #[error("request data")]
    Data(#[source] ChainError),
}

/// The disk as far as requests depend on it.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size in sectors.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Discards are served.
    pub discard: bool,
}

/// Reads the request of `chain`, or the status with which it is refused.
///
/// # Errors
/// The chain is no request.
pub fn parse(
    chain: &Chain,
    memory: &GuestMemory,
    limits: Limits,
) -> Result<Result<Request, Status>, NoRequest> {
    let mut reader = chain.reader(memory);
    let header = u128::from_le_bytes(reader.read_array::<HEADER>().map_err(NoRequest::Header)?);
    let sector = u64::try_from(header >> 64).unwrap_or(u64::MAX);
    let kind = header & u128::from(u32::MAX);
    let space = usize::try_from(chain.writable_length()).ok().and_then(|n| n.checked_sub(1));
    let space = space.ok_or(NoRequest::NoStatus)?;
    let data = reader.left();
    Ok(match kind {
        0 => transfer(sector, space, limits).map(|offset| Request::Read(offset, space)),
        1 | 11 | 13 if limits.read_only => Err(Status::IoError),
        1 => transfer(sector, data, limits).map(|offset| Request::Write(offset, data)),
        4 => Ok(Request::Flush),
        8 if space >= ID_LENGTH => Ok(Request::Id),
        8 => Err(Status::IoError),
        11 if limits.discard => ranges(reader, limits, DISCARD_SECTORS_MAX, 0)?.map(Request::Discard),
        13 => ranges(reader, limits, ZERO_SECTORS_MAX, 1)?.map(Request::WriteZeroes),
        _ => Err(Status::Unsupported),
    })
}

/// The offset in bytes of a transfer of `length` bytes.
fn transfer(sector: u64, length: usize, limits: Limits) -> Result<u64, Status> {
    let length = length as u64;
    if !length.is_multiple_of(SECTOR) || !inside(sector, length / SECTOR, limits) {
        return Err(Status::IoError);
    }
    Ok(sector * SECTOR)
}

fn inside(sector: u64, count: u64, limits: Limits) -> bool {
    sector.checked_add(count).is_some_and(|end| end <= limits.sectors)
}

fn ranges(
    mut reader: Reader<'_>,
    limits: Limits,
    sectors_max: u32,
    known_flags: u32,
) -> Result<Result<Vec<Range>, Status>, NoRequest> {
    let data = reader.left();
    let count = data / RANGE;
    if data == 0 || !data.is_multiple_of(RANGE) || count > RANGES_MAX as usize {
        return Ok(Err(Status::IoError));
    }
    let mut ranges = Vec::with_capacity(count);
    for _ in 0..count {
        let sector = u64::from_le_bytes(reader.read_array().map_err(NoRequest::Data)?);
        let sectors = u32::from_le_bytes(reader.read_array().map_err(NoRequest::Data)?);
        let flags = u32::from_le_bytes(reader.read_array().map_err(NoRequest::Data)?);
        if flags & !known_flags != 0 {
            return Ok(Err(Status::Unsupported));
        }
        if sectors > sectors_max || !inside(sector, u64::from(sectors), limits) {
            return Ok(Err(Status::IoError));
        }
        ranges.push(Range {
            offset: sector * SECTOR,
            length: u64::from(sectors) * SECTOR,
            unmap: flags & 1 != 0,
        });
    }
    Ok(Ok(ranges))
}
