//! The state file: a header, then sections with name, version, length and checksum. `README.md` has the layout.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::codec::{Invalid, Reader, Writer};

/// First bytes of a state file.
pub const MAGIC: [u8; 8] = *b"BLXSNAP\x1A";
/// Version of the layout. A reader refuses any other.
pub const VERSION: u32 = 1;
/// Largest state file in bytes.
pub const FILE_MAX: usize = 4 << 20;
/// Longest name of a section in bytes.
pub const NAME_MAX: usize = 32;
/// Most sections of a file.
pub const SECTIONS_MAX: usize = 128;
/// A reader that does not know the section may leave it out.
const OPTIONAL: u8 = 1;

const HEADER: usize = 24;

/// Why a state file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refuses.
    #[error("snapshot: {call} the state file")]
    Io {
        /// What was tried.
        call: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is no state file, is of another version, or is damaged before its first section.
    #[error("snapshot: header: {0}")]
    Header(String),
    /// A section is damaged.
    #[error("snapshot: section {name}: {problem}")]
    Damaged {
        /// Its name, or its number when the name is what is damaged.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A section is missing.
    #[error("snapshot: section {0}: missing")]
    Missing(String),
    /// What a section says is refused.
    #[error("snapshot: section {name}")]
    Refused {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: Invalid,
    },
    /// A section that this program does not know and that it must not leave out.
    #[error("snapshot: section {name}: version {version} is not known here")]
    Unknown {
        /// Its name.
        name: String,
        /// Its version.
        version: u16,
    },
}

/// CRC-32C (Castagnoli) of `bytes`, continuing from `crc` (0 at the beginning).
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0u32;
        let mut rest: &mut [u32] = &mut table;
        while let Some((entry, tail)) = rest.split_first_mut() {
            let mut crc = byte;
            let mut bit = 0;
            while bit < 8 {
                crc = crc >> 1 ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 };
                bit += 1;
            }
            *entry = crc;
            byte += 1;
            rest = tail;
        }
        table
    };
    !bytes.iter().fold(!crc, |crc, byte| {
        let [low, ..] = crc.to_le_bytes();
        crc >> 8 ^ TABLE.get(usize::from(low ^ byte)).copied().unwrap_or(0)
    })
}

/// Collects sections.
#[derive(Debug, Default)]
pub struct StateWriter {
    sections: Vec<u8>,
    count: u32,
}

impl StateWriter {
    /// Adds a section of version 1 that a reader has to know.
    pub fn add(&mut self, name: &str, fields: Writer) {
        self.put(name, 1, 0, &fields.into_bytes());
    }

    /// Adds a section that a reader may leave out.
    pub fn add_optional(&mut self, name: &str, fields: Writer) {
        self.put(name, 1, OPTIONAL, &fields.into_bytes());
    }

    fn put(&mut self, name: &str, version: u16, flags: u8, payload: &[u8]) {
        let mut head = Writer::new();
        head.u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
        head.u8(flags);
        head.u16(version);
        head.u32(u32::try_from(payload.len()).unwrap_or(u32::MAX));
        head.raw(name.as_bytes());
        let head = head.into_bytes();
        let crc = crc32c(crc32c(0, &head), payload);
        for part in [head.as_slice(), payload, &crc.to_le_bytes()] {
            self.sections.extend_from_slice(part);
        }
        self.count += 1;
    }

    /// The whole file.
    pub fn into_bytes(self) -> Vec<u8> {
        let total = HEADER + self.sections.len();
        let mut header = Writer::new();
        header.raw(&MAGIC);
        header.u32(VERSION);
        header.u32(self.count);
        header.u32(u32::try_from(total).unwrap_or(u32::MAX));
        let mut file = header.into_bytes();
        file.extend(crc32c(0, &file).to_le_bytes());
        file.extend(self.sections);
        file
    }

    /// Writes the file from the beginning of `file`, which then has nothing else. Answers the number of bytes.
    ///
    /// # Errors
    /// The system refuses.
    pub fn write_to(self, file: &File) -> Result<u64, FileError> {
        let io = |call| move |source| FileError::Io { call, source };
        let bytes = self.into_bytes();
        file.set_len(0).map_err(io("empty"))?;
        file.write_all_at(&bytes, 0).map_err(io("write"))?;
        Ok(u64::try_from(bytes.len()).unwrap_or(u64::MAX))
    }
}

/// One section.
#[derive(Debug, Clone)]
struct Section {
    name: String,
    version: u16,
    optional: bool,
    payload: Vec<u8>,
    taken: bool,
}

/// All sections of a file whose header and checksums are right.
#[derive(Debug)]
pub struct State {
    sections: Vec<Section>,
}

impl State {
    /// Reads a state file.
    ///
    /// # Errors
    /// It is longer than [`FILE_MAX`], is none, or is damaged.
    pub fn read_from(file: &File) -> Result<Self, FileError> {
        let io = |call| move |source| FileError::Io { call, source };
        let metadata = file.metadata().map_err(io("look at"))?;
        if !metadata.is_file() {
            return Err(FileError::Header("not a regular file".into()));
        }
        match usize::try_from(metadata.len()) {
            Ok(length) if length <= FILE_MAX => {
                let mut bytes = vec![0; length];
                file.read_exact_at(&mut bytes, 0).map_err(io("read"))?;
                Self::parse(&bytes)
            }
            _ => Err(FileError::Header(format!("longer than {FILE_MAX} bytes"))),
        }
    }

    /// Reads a state file from memory.
    ///
    /// # Errors
    /// It is none, or is damaged.
    pub fn parse(file: &[u8]) -> Result<Self, FileError> {
        let header = |problem: &str| FileError::Header(problem.into());
        let short = |_| header("too short");
        let mut reader = Reader::new(file);
        if reader.raw("magic", MAGIC.len()).map_err(short)? != MAGIC {
            return Err(header("not a state file of a VM"));
        }
        let version = reader.u32("version").map_err(short)?;
        if version != VERSION {
            return Err(header(&format!("version {version}, this program reads version {VERSION}")));
        }
        let count = reader.count("sections", SECTIONS_MAX).map_err(|_| header("too many sections"))?;
        let total = reader.u32("length").map_err(short)?;
        let crc = reader.u32("checksum").map_err(short)?;
        if crc != crc32c(0, file.get(..HEADER - 4).unwrap_or_default()) {
            return Err(header("checksum"));
        }
        if usize::try_from(total) != Ok(file.len()) {
            return Err(header(&format!("tells {total} bytes, the file has {}", file.len())));
        }
        let mut sections: Vec<Section> = Vec::with_capacity(count);
        for number in 0..count {
            let section = Self::section(&mut reader, number)?;
            if sections.iter().any(|other| other.name == section.name) {
                return Err(FileError::Damaged { name: section.name, problem: "is there twice".into() });
            }
            sections.push(section);
        }
        reader.end().map_err(|error| header(&format!("behind the last section: {error}")))?;
        Ok(Self { sections })
    }

    fn section(reader: &mut Reader<'_>, number: usize) -> Result<Section, FileError> {
        let number = || format!("number {number}");
        let damaged = |name: String, problem: &str| FileError::Damaged { name, problem: problem.into() };
        let short = |_| damaged(number(), "is cut off");
        let whole = reader.clone();
        let name_length = reader.u8("name").map_err(short)?;
        let flags = reader.u8("flags").map_err(short)?;
        let version = reader.u16("version").map_err(short)?;
        let length = reader.u32("length").map_err(short)?;
        let name = reader.raw("name", name_length.into()).map_err(short)?;
        let fits = (1..=NAME_MAX).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic);
        if !fits {
            return Err(damaged(number(), "has no name"));
        }
        let name = String::from_utf8_lossy(name).into_owned();
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let payload = reader.raw("content", length).map_err(|_| damaged(name.clone(), "is cut off"))?;
        let covered = 8 + usize::from(name_length) + payload.len();
        let crc = reader.u32("checksum").map_err(|_| damaged(name.clone(), "is cut off"))?;
        if crc != crc32c(0, whole.clone().raw("section", covered).unwrap_or_default()) {
            return Err(damaged(name, "checksum"));
        }
        if flags & !OPTIONAL != 0 {
            return Err(FileError::Unknown { name, version });
        }
        Ok(Section {
            name,
            version,
            optional: flags & OPTIONAL != 0,
            payload: payload.to_vec(),
            taken: false,
        })
    }

    /// Names of all sections, in their order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sections.iter().map(|section| section.name.as_str())
    }

    /// Reads section `name`, of version 1, with `read`, which has to use all of it.
    ///
    /// # Errors
    /// It is not there, is of another version, or is refused by `read`.
    pub fn take<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, Invalid>,
    ) -> Result<T, FileError> {
        self.take_optional(name, read)?.ok_or_else(|| FileError::Missing(name.into()))
    }

    /// The same for a section that may be missing.
    ///
    /// # Errors
    /// It is of another version, or is refused by `read`.
    pub fn take_optional<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, Invalid>,
    ) -> Result<Option<T>, FileError> {
        let Some(section) = self.sections.iter_mut().find(|section| section.name == name) else {
            return Ok(None);
        };
        if section.version != 1 {
            return Err(FileError::Unknown { name: name.into(), version: section.version });
        }
        section.taken = true;
        let mut reader = Reader::new(&section.payload);
        let value = read(&mut reader).and_then(|value| reader.end().map(|()| value));
        value.map(Some).map_err(|source| FileError::Refused { name: name.into(), source })
    }

    /// All sections were read, except those that may be left out.
    ///
    /// # Errors
    /// One was not read and must not be left out.
    pub fn finish(&self) -> Result<(), FileError> {
        match self.sections.iter().find(|section| !section.taken && !section.optional) {
            Some(s) => Err(FileError::Unknown { name: s.name.clone(), version: s.version }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file() -> Vec<u8> {
        let mut state = StateWriter::default();
        let mut fields = Writer::new();
        fields.u64(7);
        state.add("first", fields.clone());
        state.add_optional("extra", fields.clone());
        state.add("vcpu.0", fields);
        state.into_bytes()
    }

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(crc32c(0, b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(crc32c(0, b"1234"), b"56789"), 0xE306_9283);
    }

    #[test]
    fn sections_are_found_by_name_and_optional_ones_may_be_left_out() {
        let mut state = State::parse(&file()).unwrap();
        assert_eq!(state.names().collect::<Vec<_>>(), ["first", "extra", "vcpu.0"]);
        assert_eq!(state.take("first", |r| r.u64("x")).unwrap(), 7);
        assert!(matches!(state.finish(), Err(FileError::Unknown { name, .. }) if name == "vcpu.0"));
        let left = state.take("vcpu.0", |r| r.u32("x")).unwrap_err();
        assert_eq!(crate::chain(&left), "snapshot: section vcpu.0: 4 bytes too many");
        state.finish().unwrap();
        assert!(
            matches!(state.take("absent", |_| Ok(())), Err(FileError::Missing(name)) if name == "absent")
        );
    }

    #[test]
    fn another_version_of_the_file_is_refused_with_both_versions() {
        let mut newer = file();
        newer[8] = 2;
        let error = State::parse(&newer).unwrap_err().to_string();
        assert_eq!(error, "snapshot: header: version 2, this program reads version 1");
    }

    proptest! {
        #[test]
        fn a_damaged_byte_anywhere_is_found(at in any::<prop::sample::Index>(), bit in 0u32..8) {
            let mut bytes = file();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(State::parse(&bytes).is_err());
        }

        #[test]
        fn a_shorter_or_longer_file_is_refused(length in 0usize..200) {
            let mut bytes = file();
            let whole = bytes.len();
            bytes.resize(length, 0);
            prop_assert_eq!(State::parse(&bytes).is_ok(), length == whole);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = State::parse(&[MAGIC.as_slice(), &VERSION.to_le_bytes(), bytes.as_slice()].concat());
        }
    }
}
