//! What the log has accepted since its database was last written: one write and one flush make any number of jobs durable, where
//! a commit of the database writes seven pages. The file has a fixed size and is written from its beginning again after each
//! commit, so a flush changes no metadata of the file system.
//!
//! | a record, at a multiple of 512 | bytes |
//! |---|---|
//! | `BLXJ` | 4 |
//! | length of the content, little-endian like all numbers | 4 |
//! | generation: one more than that of the newest commit of the database | 8 |
//! | number of the record in its generation, from 0 | 8 |
//! | SHA-256 of everything else in the record, its first 8 bytes | 8 |
//! | content: operations (a kind, then its values, see [`Op`]) | |
//!
//! States: *empty* (all records have older generations), *filling*. A commit of the database names the generation that it
//! contains; that alone makes the journal empty. After a crash the records of the next generation, without a gap from 0, are what
//! the database lacks. The last one may be torn, which nobody was told of; one that is damaged and has a good one behind it is
//! damage, and is said so. What may fail: the disk. After a failure nothing is written any more, because it is not known what a
//! failed flush left on the disk.

use std::io;

use redb::StorageBackend;
use sha2::{Digest, Sha256};

use super::codec::Reader;

const MAGIC: &[u8; 4] = b"BLXJ";
const HEAD: usize = 32;
/// Where the checksum is in the head.
const SUM: std::ops::Range<usize> = 24..32;
/// Records begin at multiples of this many bytes, which disks write all or nothing of.
const SECTOR: usize = 512;
/// Bytes written at once to a new file.
const FILL: usize = 256 << 10;

/// One change of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// 0: an entry: index 8, length 4, as `codec` writes it.
    Entry(u64, Vec<u8>),
    /// 1: a vote: length 4, JSON.
    Vote(Vec<u8>),
    /// 2: no entries from this index: 8.
    TruncateFrom(u64),
    /// 3: no entries up to this index: 8, then the id of the last one: length 4, JSON.
    Purge(u64, Vec<u8>),
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    out.extend_from_slice(&u32::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes());
    out.extend_from_slice(bytes);
    Ok(())
}

fn bytes(reader: &mut Reader<'_>) -> io::Result<Vec<u8>> {
    let length = usize::try_from(reader.u32()?).map_err(io::Error::other)?;
    Ok(reader.take(length)?.to_vec())
}

impl Op {
    fn put(&self, out: &mut Vec<u8>) -> io::Result<()> {
        match self {
            Self::Entry(index, entry) => {
                out.push(0);
                out.extend_from_slice(&index.to_le_bytes());
                put_bytes(out, entry)
            }
            Self::Vote(vote) => {
                out.push(1);
                put_bytes(out, vote)
            }
            Self::TruncateFrom(index) => {
                out.push(2);
                out.extend_from_slice(&index.to_le_bytes());
                Ok(())
            }
            Self::Purge(index, id) => {
                out.push(3);
                out.extend_from_slice(&index.to_le_bytes());
                put_bytes(out, id)
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> io::Result<Self> {
        Ok(match reader.u8()? {
            0 => Self::Entry(reader.u64()?, bytes(reader)?),
            1 => Self::Vote(bytes(reader)?),
            2 => Self::TruncateFrom(reader.u64()?),
            3 => Self::Purge(reader.u64()?, bytes(reader)?),
            _ => return Err(damaged("an operation of an unknown kind")),
        })
    }
}

fn damaged(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the journal is damaged: {text}"))
}

/// The journal, open for writing.
#[derive(Debug)]
pub struct Journal {
    file: Box<dyn StorageBackend>,
    capacity: usize,
    generation: u64,
    number: u64,
    at: usize,
    failed: bool,
}

impl Journal {
    /// Opens the journal beside a database whose newest commit contains `generation`; answers what the database lacks too. With
    /// `new` whatever the file has belongs to no database, and the answer is nothing.
    ///
    /// # Errors
    /// The file cannot be read or written, or is damaged.
    pub fn open(
        file: Box<dyn StorageBackend>,
        capacity: usize,
        generation: u64,
        new: bool,
    ) -> io::Result<(Self, Vec<Op>)> {
        let whole = u64::try_from(capacity).map_err(io::Error::other)?;
        if new {
            let zeros = vec![0; FILL.min(capacity)];
            file.set_len(0)?;
            file.set_len(whole)?;
            // Blocks that were written once are there; holes would cost a change of metadata at each flush.
            let mut at = 0;
            while at < capacity {
                let length = zeros.len().min(capacity - at);
                file.write(place(at)?, zeros.get(..length).unwrap_or_default())?;
                at += length;
            }
            file.sync_data()?;
        } else if file.len()? != whole {
            return Err(damaged("it is missing, or has not its size"));
        }
        let mut content = vec![0; capacity];
        file.read(0, &mut content)?;
        let generation = generation.saturating_add(1);
        let (mut at, mut number, mut ops) = (0, 0, Vec::new());
        while let Some(record) = content.get(at..).and_then(|rest| record(rest, generation, number)) {
            let mut reader = Reader(record);
            while !reader.0.is_empty() {
                ops.push(Op::read(&mut reader)?);
            }
            at += size(record.len());
            number += 1;
        }
        let behind = content.get(at..).unwrap_or_default();
        if (0..behind.len())
            .step_by(SECTOR)
            .filter_map(|from| behind.get(from..))
            .any(|rest| later(rest, generation, number))
        {
            return Err(damaged("a record cannot be read and a later one can"));
        }
        Ok((Self { file, capacity, generation, number, at, failed: false }, ops))
    }

    /// Writes and flushes operations; false when there is no room, and then nothing was written.
    ///
    /// # Errors
    /// The disk failed, now or before.
    pub fn append<'a>(&mut self, ops: impl Iterator<Item = &'a Op>) -> io::Result<bool> {
        if self.failed {
            return Err(io::Error::other("the journal could not be written before"));
        }
        let mut bytes = vec![0; HEAD];
        for op in ops {
            op.put(&mut bytes)?;
        }
        let length = u32::try_from(bytes.len() - HEAD).map_err(io::Error::other)?;
        if self.at + size(bytes.len() - HEAD) > self.capacity {
            return Ok(false);
        }
        let head = [
            MAGIC.as_slice(),
            &length.to_le_bytes(),
            &self.generation.to_le_bytes(),
            &self.number.to_le_bytes(),
        ];
        bytes.splice(..SUM.start, head.concat());
        let sum = checksum(&bytes);
        bytes.splice(SUM, sum);
        let written = self.file.write(place(self.at)?, &bytes).and_then(|()| self.file.sync_data());
        self.failed = written.is_err();
        written?;
        self.at += size(bytes.len() - HEAD);
        self.number += 1;
        Ok(true)
    }

    /// The generation that the next commit of the database contains.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// A commit of the database contains all of it.
    pub fn stored(&mut self) {
        self.generation = self.generation.saturating_add(1);
        (self.number, self.at) = (0, 0);
    }
}

fn place(at: usize) -> io::Result<u64> {
    u64::try_from(at).map_err(io::Error::other)
}

/// What a record with this much content takes.
fn size(content: usize) -> usize {
    (HEAD + content).next_multiple_of(SECTOR)
}

fn checksum(record: &[u8]) -> [u8; 8] {
    let mut hash = Sha256::new();
    hash.update(record.get(..SUM.start).unwrap_or_default());
    hash.update(record.get(SUM.end..).unwrap_or_default());
    let mut sum = [0; 8];
    sum.iter_mut().zip(hash.finalize()).for_each(|(to, from)| *to = from);
    sum
}

/// Generation, number and content of the record that begins here, if a good one does.
fn any_record(bytes: &[u8]) -> Option<(u64, u64, &[u8])> {
    let mut reader = Reader(bytes);
    if reader.take(MAGIC.len()).ok()? != MAGIC {
        return None;
    }
    let length = usize::try_from(reader.u32().ok()?).ok()?;
    let (generation, number) = (reader.u64().ok()?, reader.u64().ok()?);
    let whole = bytes.get(..HEAD.checked_add(length)?)?;
    let sum = whole.get(SUM)?;
    (checksum(whole) == sum).then(|| whole.get(HEAD..).map(|content| (generation, number, content)))?
}

fn record(bytes: &[u8], generation: u64, number: u64) -> Option<&[u8]> {
    any_record(bytes).filter(|found| (found.0, found.1) == (generation, number)).map(|found| found.2)
}

fn later(bytes: &[u8], generation: u64, number: u64) -> bool {
    any_record(bytes).is_some_and(|found| found.0 == generation && found.1 > number)
}

#[cfg(test)]
mod tests;
