//! Quoting for the three small languages the rig writes: POSIX shell, QEMU options, `/etc/fstab`.

/// One word of a shell command, whatever it contains.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A command as typed: one argument is a shell script, several are one program with its arguments.
pub fn command(words: &[String]) -> String {
    match words {
        [script] => script.clone(),
        words => words.iter().map(|w| quote(w)).collect::<Vec<_>>().join(" "),
    }
}

/// A value inside a comma-separated QEMU option.
pub fn qemu(value: &str) -> String {
    value.replace(',', ",,")
}

/// A field of `/etc/fstab` (octal escapes, fstab(5)).
pub fn fstab(field: &str) -> String {
    field.replace('\\', r"\134").replace(' ', r"\040").replace('\t', r"\011").replace('\n', r"\012")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_word_is_a_script_and_several_are_quoted() {
        assert_eq!(command(&["echo $HOME; ls".into()]), "echo $HOME; ls");
        assert_eq!(command(&["echo".into(), "a b".into(), "it's".into()]), r"echo 'a b' 'it'\''s'");
        assert_eq!(command(&["test".into(), String::new()]), "test ''");
    }

    #[test]
    fn separators_are_escaped() {
        assert_eq!(qemu("/a,b"), "/a,,b");
        assert_eq!(fstab("/a b"), r"/a\040b");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_shell_reads_back_any_word(word in "[^\0]{0,40}") {
            let script = format!("printf %s {}", quote(&word));
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            prop_assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
