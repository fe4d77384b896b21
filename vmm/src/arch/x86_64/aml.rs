//! The few words of AML (ACPI 6.5 section 20) that our DSDT needs. Each function returns bytes; nesting is concatenation.

/// `Name (NAME, value)`.
pub fn name(name: [u8; 4], value: &[u8]) -> Vec<u8> {
    [&[0x08], name.as_slice(), value].concat()
}

/// `Device (NAME) { body }`.
pub fn device(name: [u8; 4], body: &[Vec<u8>]) -> Vec<u8> {
    [&[0x5B, 0x82], package_with_length(&[&name, body.concat().as_slice()].concat()).as_slice()].concat()
}

/// `Scope (\NAME) { body }`.
pub fn scope(name: [u8; 4], body: &[Vec<u8>]) -> Vec<u8> {
    [&[0x10], package_with_length(&[b"\\", name.as_slice(), body.concat().as_slice()].concat()).as_slice()]
        .concat()
}

/// A string of printable ASCII.
pub fn string(text: &str) -> Vec<u8> {
    [&[0x0D], text.as_bytes(), &[0]].concat()
}

/// `Method (NAME, arguments, NotSerialized) { body }`.
pub fn method(name: [u8; 4], arguments: u8, body: &[Vec<u8>]) -> Vec<u8> {
    let flags = [arguments & 7];
    let inside = [name.as_slice(), &flags, body.concat().as_slice()].concat();
    [&[0x14], package_with_length(&inside).as_slice()].concat()
}

/// `Notify (NAME, value)`.
pub fn notify(name: [u8; 4], value: u8) -> Vec<u8> {
    [&[0x86], name.as_slice(), &integer(value.into())].concat()
}

/// `Package () { elements }`.
pub fn package(elements: &[Vec<u8>]) -> Vec<u8> {
    let count = u8::try_from(elements.len()).unwrap_or(u8::MAX);
    [&[0x12], package_with_length(&[&[count], elements.concat().as_slice()].concat()).as_slice()].concat()
}

/// An integer in its shortest form.
pub fn integer(value: u64) -> Vec<u8> {
    let [a, b, c, d, ..] = value.to_le_bytes();
    match value {
        0 => vec![0x00],
        1 => vec![0x01],
        2..=0xFF => vec![0x0A, a],
        0x100..=0xFFFF => vec![0x0B, a, b],
        0x1_0000..=0xFFFF_FFFF => vec![0x0C, a, b, c, d],
        _ => [&[0x0E], value.to_le_bytes().as_slice()].concat(),
    }
}

/// `EisaId ("AAAdddd")` as ACPI 6.5 section 19.3.4 packs it; `number` is the hexadecimal part.
pub fn eisa_id(vendor: [u8; 3], number: u16) -> Vec<u8> {
    let [a, b, c] = vendor.map(|letter| u32::from(letter & 0x1F));
    let id = a << 26 | b << 21 | c << 16 | u32::from(number);
    [&[0x0C], id.to_be_bytes().as_slice()].concat()
}

/// `ResourceTemplate () { descriptors }`.
pub fn resources(descriptors: &[Vec<u8>]) -> Vec<u8> {
    // The end tag's checksum 0 means: not checked.
    let bytes = [descriptors.concat().as_slice(), &[0x79, 0]].concat();
    let length = integer(u64::try_from(bytes.len()).unwrap_or(0));
    [&[0x11], package_with_length(&[length, bytes].concat()).as_slice()].concat()
}

/// Bus numbers `first` to `last`, produced by a bridge (ACPI 6.5 section 6.4.3.5.3).
pub fn bus_numbers(first: u16, last: u16) -> Vec<u8> {
    let fields = [0, first, last, 0, last - first + 1];
    [&[0x88, 13, 0, 2, 0x0C, 0], words(&fields).as_slice()].concat()
}

/// A window of 32-bit memory, not cacheable, writable, produced by a bridge (section 6.4.3.5.2).
pub fn memory_window(start: u32, last: u32) -> Vec<u8> {
    let fields = [0, start, last, 0, last - start + 1];
    let bytes: Vec<u8> = fields.iter().flat_map(|f| f.to_le_bytes()).collect();
    [&[0x87, 23, 0, 0, 0x0C, 1], bytes.as_slice()].concat()
}

/// Fixed writable 32-bit memory (section 6.4.3.4).
pub fn memory_fixed(start: u32, size: u32) -> Vec<u8> {
    [&[0x86, 9, 0, 1], start.to_le_bytes().as_slice(), &size.to_le_bytes()].concat()
}

/// Ports, 16-bit decoded (section 6.4.2.5).
pub fn ports(first: u16, count: u8) -> Vec<u8> {
    [&[0x47, 1], words(&[first, first]).as_slice(), &[1, count]].concat()
}

/// One edge-triggered, active-high, exclusive interrupt (section 6.4.3.6).
pub fn interrupt(number: u32) -> Vec<u8> {
    [&[0x89, 6, 0, 3, 1], number.to_le_bytes().as_slice()].concat()
}

fn words(values: &[u16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `body` behind its PkgLength (section 20.2.4), which counts itself.
fn package_with_length(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap_or(0);
    let [low, mid, high, _] = match length {
        0..=62 => [0; 4],
        63..=0xFFD => ((length + 2) >> 4).to_le_bytes(),
        _ => ((length + 3) >> 4).to_le_bytes(),
    };
    let nibble = |total: u32| total.to_le_bytes().first().map_or(0, |b| b & 0xF);
    let head = match length {
        0..=62 => vec![length.to_le_bytes().first().map_or(1, |b| b + 1)],
        63..=0xFFD => vec![1 << 6 | nibble(length + 2), low],
        _ => vec![2 << 6 | nibble(length + 3), low, mid.max(high)],
    };
    [head.as_slice(), body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_integers_have_the_bytes_of_the_specification() {
        assert_eq!(eisa_id(*b"PNP", 0x0A03), [0x0C, 0x41, 0xD0, 0x0A, 0x03]);
        assert_eq!(integer(0xCF8), [0x0B, 0xF8, 0x0C]);
        assert_eq!(integer(5), [0x0A, 5]);
    }

    #[test]
    fn package_lengths_count_themselves() {
        assert_eq!(package_with_length(&[9; 3])[0], 4);
        assert_eq!(&package_with_length(&[9; 62])[..1], [63]);
        assert_eq!(&package_with_length(&[9; 63])[..2], [0x41, 4]);
        assert_eq!(package_with_length(&[9; 0xFFD]).len(), 0xFFF);
        assert_eq!(&package_with_length(&[9; 0xFFD])[..2], [0x4F, 0xFF]);
        assert_eq!(&package_with_length(&[9; 0xFFE])[..3], [0x81, 0, 1]);
    }
}
