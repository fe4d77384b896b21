//! Read, write and flush on a backing: at once with `preadv` and `pwritev`.

use std::io;

use super::backing::Backing;
use super::iovec::IoVecs;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffers from an offset in bytes on.
    Read(u64),
    /// Store the buffers from an offset in bytes on; durable when `durable`.
    Write {
        /// Where to.
        offset: u64,
        /// Whether it has to be on stable storage when it is done.
        durable: bool,
    },
    /// Make all finished writes durable.
    Flush,
}

/// A finished operation.
pub struct Finished {
    /// The name it was started under.
    pub id: u16,
    /// Its buffers, for reuse.
    pub buffers: IoVecs,
    /// How it went. Success means that all bytes were transferred.
    pub result: io::Result<()>,
}

/// Does operations on a backing.
pub struct Engine {
    backing: Backing,
}

impl Engine {
    /// An engine on `backing`.
    pub fn new(backing: Backing) -> Self {
        Self { backing }
    }

    /// The backing.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Starts an operation under the name `id`, which no operation in flight has. When it could be done at once it comes
    /// back finished.
    pub fn start(&mut self, id: u16, operation: Operation, mut buffers: IoVecs) -> Option<Finished> {
        let result = self.transfer(operation, &mut buffers);
        Some(Finished { id, buffers, result })
    }

    fn transfer(&self, operation: Operation, buffers: &mut IoVecs) -> io::Result<()> {
        let fd = self.backing.fd();
        match operation {
            Operation::Read(offset) => all(offset, buffers, |b, at| b.read_from_at(fd, at)),
            Operation::Write { offset, durable } => {
                all(offset, buffers, |b, at| b.write_to_at(fd, at))?;
                if durable { self.backing.flush() } else { Ok(()) }
            }
            Operation::Flush => self.backing.flush(),
        }
    }
}

/// Repeats a transfer until nothing is left.
fn all(
    mut offset: u64,
    buffers: &mut IoVecs,
    transfer: impl Fn(&IoVecs, i64) -> io::Result<usize>,
) -> io::Result<()> {
    while buffers.left() > 0 {
        let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        match transfer(buffers, at) {
            // The backing is shorter than it was.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                buffers.advance(count);
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
