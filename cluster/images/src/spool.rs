//! Where expanded archives lie while an import runs: files without a name in a directory of the caller. The contents
//! of an image's files stay here until they are copied into the image; memory holds only where they are.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::decompress::Decoder;
use crate::limits::{Budget, LimitReached};

/// A part of a spool file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    file: usize,
    offset: u64,
    /// Length in bytes.
    pub length: u64,
}

impl Region {
    /// The part of this region that begins at `offset` and has `length` bytes; `None` if that is not within it.
    pub fn part(self, offset: u64, length: u64) -> Option<Self> {
        let end = offset.checked_add(length)?;
        (end <= self.length).then_some(Self { file: self.file, offset: self.offset + offset, length })
    }
}

/// Why spooling ended.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The spool directory cannot be used.
    #[error("writing to the spool directory {directory}")]
    Write {
        /// Which.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What was spooled before cannot be read.
    #[error("reading the spool file")]
    Read(#[source] io::Error),
    /// The source broke off, or what it sends cannot be decompressed.
    #[error("reading the source")]
    Source(#[source] io::Error),
    /// A bound was reached.
    #[error(transparent)]
    Limit(#[from] LimitReached),
}

/// All spool files of one import.
pub struct Spool {
    directory: PathBuf,
    files: Vec<File>,
    budget: Budget,
}

impl Spool {
    /// An empty spool in `directory` that holds at most `bytes`.
    pub fn new(directory: &Path, bytes: u64) -> Self {
        let budget = Budget::new("bytes after decompression", bytes);
        Self { directory: directory.into(), files: vec![], budget }
    }

    /// Takes all of `source`; the answer is where it is and its SHA-256.
    ///
    /// # Errors
    /// The source cannot be read, the directory is full, or the bound is reached.
    pub fn take(&mut self, source: &mut dyn Read) -> Result<(Region, [u8; 32]), SpoolError> {
        let failed = |source| SpoolError::Write { directory: self.directory.clone(), source };
        let mut file = tempfile::tempfile_in(&self.directory).map_err(failed)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 128 << 10];
        let mut length: u64 = 0;
        loop {
            let count = match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(SpoolError::Source(error)),
            };
            let bytes = buffer.get(..count).unwrap_or(&[]);
            let count = u64::try_from(count).unwrap_or(u64::MAX);
            self.budget.take(count)?;
            length += count;
            hash.update(bytes);
            file.write_all(bytes).map_err(failed)?;
        }
        self.files.push(file);
        Ok((Region { file: self.files.len() - 1, offset: 0, length }, hash.finalize().into()))
    }

    /// Decompresses a region into another one; the answer is that and its SHA-256.
    ///
    /// # Errors
    /// It cannot be decompressed, the directory is full, or the bound is reached.
    pub fn expand(&mut self, region: Region) -> Result<(Region, [u8; 32]), SpoolError> {
        let file =
            self.files.get(region.file).ok_or_else(|| SpoolError::Read(io::ErrorKind::NotFound.into()))?;
        let file = file.try_clone().map_err(SpoolError::Read)?;
        let mut source = Decoder::new(Window { file, region, position: 0 }).map_err(SpoolError::Source)?;
        self.take(&mut source)
    }

    /// Fills `buffer` from `offset` of `region`.
    ///
    /// # Errors
    /// That is not within the region, or the file cannot be read.
    pub fn read(&self, region: Region, offset: u64, buffer: &mut [u8]) -> Result<(), SpoolError> {
        let wanted = u64::try_from(buffer.len()).unwrap_or(u64::MAX);
        let outside = || SpoolError::Read(io::ErrorKind::UnexpectedEof.into());
        let part = region.part(offset, wanted).ok_or_else(outside)?;
        let file = self.files.get(part.file).ok_or_else(outside)?;
        file.read_exact_at(buffer, part.offset).map_err(SpoolError::Read)
    }

    /// All bytes of a short region.
    ///
    /// # Errors
    /// It is longer than `most`, or cannot be read.
    pub fn bytes(&self, region: Region, most: u64, what: &'static str) -> Result<Vec<u8>, SpoolError> {
        Budget::new(what, most).take(region.length)?;
        let mut bytes = vec![0; usize::try_from(region.length).unwrap_or(0)];
        self.read(region, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// A copy of a region as a file of its own, without a name.
    ///
    /// # Errors
    /// The directory is full, or the region cannot be read.
    pub fn copy(&self, region: Region) -> Result<File, SpoolError> {
        let failed = |source| SpoolError::Write { directory: self.directory.clone(), source };
        let mut file = tempfile::tempfile_in(&self.directory).map_err(failed)?;
        self.each(region, |part| file.write_all(part).map_err(failed))?;
        Ok(file)
    }

    /// Reads a region piece by piece.
    fn each(
        &self,
        region: Region,
        mut take: impl FnMut(&[u8]) -> Result<(), SpoolError>,
    ) -> Result<(), SpoolError> {
        let mut buffer = vec![0; 128 << 10];
        let mut position = 0;
        while position < region.length {
            let left = usize::try_from(region.length - position).unwrap_or(usize::MAX);
            let count = left.min(buffer.len());
            let Some(part) = buffer.get_mut(..count) else { break };
            self.read(region, position, part)?;
            take(part)?;
            position += u64::try_from(count).unwrap_or(u64::MAX);
        }
        Ok(())
    }

    /// The SHA-256 of one region.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn digest(&self, region: Region) -> Result<[u8; 32], SpoolError> {
        let mut hash = Sha256::new();
        self.each(region, |part| {
            hash.update(part);
            Ok(())
        })?;
        Ok(hash.finalize().into())
    }
}

/// Reads one region from start to end.
struct Window {
    file: File,
    region: Region,
    position: u64,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.region.length - self.position).unwrap_or(usize::MAX);
        let count = buffer.len().min(left);
        let part = buffer.get_mut(..count).unwrap_or(&mut []);
        let count = self.file.read_at(part, self.region.offset + self.position)?;
        self.position += u64::try_from(count).unwrap_or(0);
        Ok(count)
    }
}
