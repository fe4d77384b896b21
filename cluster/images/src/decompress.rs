//! Decompression by magic number: gzip (RFC 1952), zstd (RFC 8878), xz (.xz file format 1.2.1), or none.
//! All decoders are Rust without C; each bounds its window, so that memory is bounded too.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

/// Largest zstd window (the format's own recommendation for decoders is 8 MiB; `zstd --long` makes 128 MiB).
const ZSTD_WINDOW_MAX: u64 = 128 << 20;
/// Most KiB of memory for xz: `xz -9` needs 65 MiB.
const XZ_MEMORY_MAX_KIB: u32 = 130 << 10;
/// Magic numbers of skippable zstd frames (RFC 8878, section 3.1.2).
const ZSTD_SKIPPABLE: std::ops::RangeInclusive<u32> = 0x184D_2A50..=0x184D_2A5F;

/// A reader of decompressed bytes.
pub enum Decoder<R: Read> {
    /// Not compressed.
    Plain(BufReader<R>),
    /// gzip, any number of members.
    Gzip(Box<MultiGzDecoder<BufReader<R>>>),
    /// zstd, any number of frames.
    Zstd(Box<Zstd<BufReader<R>>>),
    /// xz, any number of streams.
    Xz(Box<XzReader<BufReader<R>>>),
}

impl<R: Read> Decoder<R> {
    /// Looks at the first bytes and chooses.
    ///
    /// # Errors
    /// `source` cannot be read.
    pub fn new(source: R) -> io::Result<Self> {
        let mut source = BufReader::with_capacity(64 << 10, source);
        // A source that gives single bytes at first is taken for one that is not compressed; none here does.
        let start = source.fill_buf()?;
        Ok(if start.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip(Box::new(MultiGzDecoder::new(source)))
        } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            Self::Zstd(Box::new(Zstd::Between(Some(source))))
        } else if start.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
            Self::Xz(Box::new(XzReader::new_mem_limit(source, true, XZ_MEMORY_MAX_KIB)))
        } else {
            Self::Plain(source)
        })
    }

    /// True if the source is compressed.
    pub fn is_compressed(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read(buffer),
            Self::Gzip(reader) => reader.read(buffer),
            Self::Zstd(reader) => reader.read(buffer),
            Self::Xz(reader) => reader.read(buffer),
        }
    }
}

type Frame<R> = StreamingDecoder<Chain<Cursor<[u8; 4]>, R>, FrameDecoder>;

/// Frame after frame of a zstd stream.
pub enum Zstd<R: Read> {
    /// At the start of a frame, or at the end. `None` after an error.
    Between(Option<R>),
    /// In a frame.
    Within(Box<Frame<R>>),
}

impl<R: Read> Zstd<R> {
    /// Goes to the start of the next frame's contents; false at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        let mut source = match self {
            Self::Within(_) => return Ok(true),
            Self::Between(source) => source.take().ok_or(io::ErrorKind::InvalidData)?,
        };
        loop {
            let mut magic = [0; 4];
            let mut first = (&mut source).take(4);
            let mut start = vec![];
            first.read_to_end(&mut start)?;
            if start.is_empty() {
                *self = Self::Between(Some(source));
                return Ok(false);
            }
            if start.len() < 4 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            magic.copy_from_slice(&start);
            if !ZSTD_SKIPPABLE.contains(&u32::from_le_bytes(magic)) {
                let source = Cursor::new(magic).chain(source);
                let frame = StreamingDecoder::new_with_max_window_size(source, ZSTD_WINDOW_MAX);
                *self = Self::Within(Box::new(frame.map_err(io::Error::other)?));
                return Ok(true);
            }
            let mut length = [0; 4];
            source.read_exact(&mut length)?;
            let length = u64::from(u32::from_le_bytes(length));
            if io::copy(&mut (&mut source).take(length), &mut io::sink())? < length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl<R: Read> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !buffer.is_empty() && self.next_frame()? {
            let Self::Within(frame) = self else { break };
            let length = frame.read(buffer)?;
            if length > 0 {
                return Ok(length);
            }
            if let Self::Within(frame) = std::mem::replace(self, Self::Between(None)) {
                let (source, decoder) = frame.into_parts();
                let told = decoder.get_checksum_from_data();
                if told.is_some() && told != decoder.get_calculated_checksum() {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "wrong checksum of a zstd frame"));
                }
                *self = Self::Between(Some(source.into_inner().1));
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = vec![];
        Decoder::new(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn what_is_not_compressed_stays_as_it_is() {
        assert_eq!(decode(b"plain").unwrap(), b"plain");
        assert_eq!(decode(b"").unwrap(), b"");
    }

    #[test]
    fn several_members_and_frames_follow_each_other() {
        assert_eq!(decode(&[gzip(b"one"), gzip(b"two")].concat()).unwrap(), b"onetwo");
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0], b"xyz".as_slice()].concat();
        assert_eq!(decode(&[zstd(b"one"), skippable, zstd(b"two")].concat()).unwrap(), b"onetwo");
    }

    #[test]
    fn xz_files_are_read() {
        // `printf hello | xz --check=crc32`
        let file = [
            0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x00, 0x21, 0x01,
            0x16, 0x00, 0x00, 0x00, 0x74, 0x2f, 0xe5, 0xa3, 0x01, 0x00, 0x04, 0x68, 0x65, 0x6c, 0x6c, 0x6f,
            0x00, 0x00, 0x00, 0x00, 0x86, 0xa6, 0x10, 0x36, 0x00, 0x01, 0x19, 0x05, 0xbc, 0xe8, 0xec, 0xcb,
            0x90, 0x42, 0x99, 0x0d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x01, 0x59, 0x5a,
        ];
        assert_eq!(decode(&file).unwrap(), b"hello");
    }

    #[test]
    fn a_cut_stream_is_an_error() {
        let text = vec![7; 100_000];
        for whole in [gzip(&text), zstd(&text)] {
            assert!(decode(&whole[..whole.len() - 5]).is_err());
        }
    }

    proptest! {
        #[test]
        fn compressed_bytes_come_back(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            prop_assert_eq!(decode(&gzip(&bytes)).unwrap(), bytes.clone());
            prop_assert_eq!(decode(&zstd(&bytes)).unwrap(), bytes);
        }

        #[test]
        fn arbitrary_bytes_behind_a_magic_number_never_panic(kind in 0usize..3, bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let magic: &[u8] = [&[0x1f, 0x8b, 8][..], &[0x28, 0xb5, 0x2f, 0xfd], &[0xfd, b'7', b'z', b'X', b'Z', 0]][kind];
            let _any = decode(&[magic, &bytes].concat());
        }
    }
}
