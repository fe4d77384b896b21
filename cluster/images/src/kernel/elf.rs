//! The little of ELF that is needed here (System V ABI, "Object Files"; x86-64 supplement): is it one, of which kind,
//! and what a module's `.modinfo` section says (Linux `include/linux/module.h`, `MODULE_INFO`).

/// Kind of an ELF file: `e_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElfKind {
    /// `ET_REL`: a module.
    Relocatable,
    /// `ET_EXEC` or `ET_DYN`: a kernel.
    Executable,
}

/// A module that cannot be loaded into the kernel it comes with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// It is no relocatable ELF file for this processor.
    #[error("not a kernel module for x86-64")]
    NotAModule,
    /// It was built for another kernel.
    #[error("built for kernel {built_for:?}, not for {release:?}")]
    OtherKernel {
        /// What its `vermagic` says.
        built_for: String,
        /// The bundle's kernel.
        release: String,
    },
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(N)?)?;
    Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn offset<const N: usize>(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(number::<N>(bytes, at)?).ok()
}

/// The kind of a 64-bit little-endian x86-64 file; `None` if it is something else.
pub fn kind(bytes: &[u8]) -> Option<ElfKind> {
    // Magic, ELFCLASS64, ELFDATA2LSB, EV_CURRENT; then EM_X86_64.
    if !bytes.starts_with(&[0x7f, b'E', b'L', b'F', 2, 1, 1]) || number::<2>(bytes, 18)? != 62 {
        return None;
    }
    match number::<2>(bytes, 16)? {
        1 => Some(ElfKind::Relocatable),
        2 | 3 => Some(ElfKind::Executable),
        _ => None,
    }
}

/// The bytes of the section with this name.
fn section<'a>(bytes: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let (table, entry) = (offset::<8>(bytes, 40)?, offset::<2>(bytes, 58)?);
    let (count, names) = (offset::<2>(bytes, 60)?, offset::<2>(bytes, 62)?);
    let header = |index: usize| bytes.get(table.checked_add(index.checked_mul(entry)?)?..);
    let contents = |header: &[u8]| {
        let (start, length) = (offset::<8>(header, 24)?, offset::<8>(header, 32)?);
        bytes.get(start..start.checked_add(length)?)
    };
    let names = contents(header(names)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let own = names.get(offset::<4>(header, 0)?..)?;
        let own = own.split(|byte| *byte == 0).next()?;
        if own == name.as_bytes() { contents(header) } else { None }
    })
}

/// What a module says about itself under this key.
fn modinfo<'a>(module: &'a [u8], key: &str) -> Option<&'a str> {
    let found = section(module, ".modinfo")?.split(|byte| *byte == 0).find_map(|pair| {
        let value = pair.strip_prefix(key.as_bytes())?;
        value.strip_prefix(b"=")
    })?;
    std::str::from_utf8(found).ok()
}

/// Names of the modules that this one needs.
///
/// # Errors
/// It is no module.
pub fn needed(module: &[u8]) -> Result<Vec<&str>, ModuleError> {
    check_kind(module)?;
    let names = modinfo(module, "depends").unwrap_or("");
    Ok(names.split(',').filter(|name| !name.is_empty()).collect())
}

/// Checks that this is a module for the kernel `release`.
///
/// # Errors
/// It is none, or one of another kernel.
pub fn check_module(module: &[u8], release: &str) -> Result<(), ModuleError> {
    check_kind(module)?;
    // The version is the first word; the kernel refuses any other.
    let built_for = modinfo(module, "vermagic").and_then(|text| text.split(' ').next()).unwrap_or("");
    if built_for == release {
        return Ok(());
    }
    let built_for = built_for.chars().take(80).collect();
    Err(ModuleError::OtherKernel { built_for, release: release.into() })
}

fn check_kind(module: &[u8]) -> Result<(), ModuleError> {
    if kind(module) == Some(ElfKind::Relocatable) { Ok(()) } else { Err(ModuleError::NotAModule) }
}

/// A minimal module for tests, with these lines in its `.modinfo`.
#[cfg(test)]
pub fn test_module(lines: &[&str]) -> Vec<u8> {
    let info: Vec<u8> = lines.iter().flat_map(|line| [line.as_bytes(), b"\0"].concat()).collect();
    let names = b"\0.modinfo\0.shstrtab\0";
    let mut bytes = vec![0; 64];
    bytes[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    bytes[16] = 1;
    bytes[18] = 62;
    let info_at = bytes.len();
    bytes.extend(&info);
    let names_at = bytes.len();
    bytes.extend(names);
    let table = bytes.len() as u64;
    bytes[40..48].copy_from_slice(&table.to_le_bytes());
    bytes[58] = 64;
    bytes[60] = 3;
    bytes[62] = 2;
    for (name, at, length) in [(0u32, 0, 0), (1, info_at, info.len()), (10, names_at, names.len())] {
        let mut header = vec![0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(length as u64).to_le_bytes());
        bytes.extend(header);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_module_tells_what_it_needs_and_what_it_was_built_for() {
        let module = test_module(&["license=GPL", "depends=a,b-c", "vermagic=6.1.0 SMP preempt"]);
        assert_eq!(needed(&module).unwrap(), ["a", "b-c"]);
        check_module(&module, "6.1.0").unwrap();
        let error = check_module(&module, "6.2.0").unwrap_err();
        assert_eq!(error, ModuleError::OtherKernel { built_for: "6.1.0".into(), release: "6.2.0".into() });
        assert_eq!(needed(b"\x7fELF"), Err(ModuleError::NotAModule));
    }

    proptest! {
        #[test]
        fn a_damaged_module_never_panics(at in 0usize..400, value: u8) {
            let mut module = test_module(&["depends=a", "vermagic=6.1.0"]);
            let at = at % module.len();
            module[at] = value;
            let _any = (needed(&module).map(|n| n.len()), check_module(&module, "6.1.0"));
        }
    }
}
