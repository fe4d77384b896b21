//! How state is written inside a section: little-endian integers and byte strings with their length, in a fixed order.
//!
//! What is read was written by somebody else: each read is checked against the end, each length against a bound that the
//! reader gives, and a section has to be used up.

/// Why a section is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// It ends too early.
    #[error("ends within {0}")]
    Short(&'static str),
    /// Something follows its last field.
    #[error("{0} bytes too many")]
    Long(usize),
    /// A field has a value that it cannot have.
    #[error("{what}: {value:#x} is not possible")]
    Value {
        /// Which field.
        what: &'static str,
        /// What it says.
        value: u64,
    },
    /// It does not fit what there is in this VM.
    #[error("{0}")]
    Mismatch(String),
}

/// Writes the fields of a section.
#[derive(Debug, Default, Clone)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// A byte.
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    /// A truth value, as 0 or 1.
    pub fn bool(&mut self, value: bool) {
        self.u8(value.into());
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    /// Bytes whose number is known to the reader.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Bytes with their number (four bytes) before them.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.raw(bytes);
    }
}

/// Reads the fields of a section.
#[derive(Debug, Clone)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// All of `bytes` is to be read.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn raw(&mut self, what: &'static str, count: usize) -> Result<&'a [u8], Invalid> {
        let (front, rest) = self.0.split_at_checked(count).ok_or(Invalid::Short(what))?;
        self.0 = rest;
        Ok(front)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Invalid> {
        let bytes = self.raw(what, N)?;
        <[u8; N]>::try_from(bytes).map_err(|_| Invalid::Short(what))
    }

    /// A byte.
    ///
    /// # Errors
    /// There is none.
    pub fn u8(&mut self, what: &'static str) -> Result<u8, Invalid> {
        self.array::<1>(what).map(|[byte]| byte)
    }

    /// A truth value.
    ///
    /// # Errors
    /// There is none, or it is neither 0 nor 1.
    pub fn bool(&mut self, what: &'static str) -> Result<bool, Invalid> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Invalid::Value { what, value: other.into() }),
        }
    }

    /// Two bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn u16(&mut self, what: &'static str) -> Result<u16, Invalid> {
        self.array(what).map(u16::from_le_bytes)
    }

    /// Four bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn u32(&mut self, what: &'static str) -> Result<u32, Invalid> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn u64(&mut self, what: &'static str) -> Result<u64, Invalid> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Bytes with their number before them, at most `max`.
    ///
    /// # Errors
    /// There are fewer, or more are told than `max`.
    pub fn bytes(&mut self, what: &'static str, max: usize) -> Result<&'a [u8], Invalid> {
        let count = self.count(what, max)?;
        self.raw(what, count)
    }

    /// A number of things (four bytes), at most `max`.
    ///
    /// # Errors
    /// It is larger, or not there.
    pub fn count(&mut self, what: &'static str, max: usize) -> Result<usize, Invalid> {
        let value = self.u32(what)?;
        match usize::try_from(value) {
            Ok(count) if count <= max => Ok(count),
            _ => Err(Invalid::Value { what, value: value.into() }),
        }
    }

    /// Everything was read.
    ///
    /// # Errors
    /// Something is left.
    pub fn end(&self) -> Result<(), Invalid> {
        if self.0.is_empty() { Ok(()) } else { Err(Invalid::Long(self.0.len())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_is_left() {
        let mut writer = Writer::new();
        writer.u8(1);
        writer.bool(true);
        writer.u16(2);
        writer.u32(3);
        writer.u64(4);
        writer.bytes(b"five");
        let bytes = writer.into_bytes();
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.u8("a"), Ok(1));
        assert_eq!(reader.bool("b"), Ok(true));
        assert_eq!(reader.u16("c"), Ok(2));
        assert_eq!(reader.u32("d"), Ok(3));
        assert_eq!(reader.clone().end(), Err(Invalid::Long(16)));
        assert_eq!(reader.u64("e"), Ok(4));
        assert_eq!(reader.bytes("f", 4), Ok(b"five".as_slice()));
        assert_eq!(reader.end(), Ok(()));
        assert_eq!(reader.u8("g"), Err(Invalid::Short("g")));
    }

    #[test]
    fn a_length_over_its_bound_is_refused_before_anything_is_taken() {
        let mut writer = Writer::new();
        writer.bytes(&[0; 9]);
        let bytes = writer.into_bytes();
        assert_eq!(Reader::new(&bytes).bytes("x", 8), Err(Invalid::Value { what: "x", value: 9 }));
        assert_eq!(Reader::new(&bytes[..8]).bytes("x", 9), Err(Invalid::Short("x")));
    }
}
