//! What kind of character each is, as the expressions that split text ask: one byte of flags for every code point.
//!
//! The flags come from the tables that the expressions themselves are compiled with, so the two cannot differ by a version
//! of Unicode. Made once for a process, when the first tokeniser wants them.

use std::sync::LazyLock;

use regex_syntax::{
    Parser,
    hir::{Class, HirKind},
};
use unicode_normalization_alignments::{IsNormalized, char::canonical_combining_class, is_nfc_quick};

/// `\p{L}`.
pub(super) const LETTER: u8 = 1;
/// `\p{N}`.
pub(super) const NUMBER: u8 = 1 << 1;
/// `\s`.
pub(super) const SPACE: u8 = 1 << 2;
/// `\p{M}`.
pub(super) const MARK: u8 = 1 << 3;
/// `\p{P}` or `\p{S}`.
pub(super) const SYMBOL: u8 = 1 << 4;
/// `char::is_numeric`, which splits digits where a tokeniser says `Digits`.
pub(super) const DIGIT: u8 = 1 << 5;
/// The ideographs and kana that DeepSeek splits off.
pub(super) const IDEOGRAPH: u8 = 1 << 6;
/// NFC may change it, or put it together with its neighbours.
pub(super) const UNSTABLE: u8 = 1 << 7;

const CODE_POINTS: usize = 0x11_0000;
/// Characters from here on are rare, and told to be unstable: that costs time and nothing else.
const CHECKED_BELOW: u32 = 0x3_0000;

/// Flags by code point.
pub(super) fn classes() -> &'static [u8] {
    static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut table = vec![0; CODE_POINTS];
        for (expression, flag) in [
            (r"\p{L}", LETTER),
            (r"\p{N}", NUMBER),
            (r"\s", SPACE),
            (r"\p{M}", MARK),
            (r"[\p{P}\p{S}]", SYMBOL),
            (r"[一-龥぀-ゟ゠-ヿ]", IDEOGRAPH),
        ] {
            for (first, last) in ranges(expression) {
                table[first as usize..=last as usize].iter_mut().for_each(|flags| *flags |= flag);
            }
        }
        for (code, flags) in table.iter_mut().enumerate() {
            let character = char::from_u32(code as u32);
            if character.is_some_and(char::is_numeric) {
                *flags |= DIGIT;
            }
            if character.is_none_or(|character| !is_stable(character)) {
                *flags |= UNSTABLE;
            }
        }
        table
    });
    &TABLE
}

/// Whether a text of such characters is in NFC whatever comes together.
fn is_stable(character: char) -> bool {
    u32::from(character) < CHECKED_BELOW
        && canonical_combining_class(character) == 0
        && matches!(is_nfc_quick(std::iter::once(character)), IsNormalized::Yes)
}

/// The code points of a class; none for what is no class.
fn ranges(expression: &str) -> Vec<(u32, u32)> {
    match Parser::new().parse(expression).map(regex_syntax::hir::Hir::into_kind) {
        Ok(HirKind::Class(Class::Unicode(class))) => {
            class.iter().map(|range| (range.start().into(), range.end().into())).collect()
        }
        _ => Vec::new(),
    }
}

/// The code point whose first byte is at `at`, and its length in bytes. `bytes` is UTF-8 from there on.
pub(super) fn decode(bytes: &[u8], at: usize) -> (u32, usize) {
    let low = |offset: usize| u32::from(bytes[at + offset] & 0x3f);
    match bytes[at] {
        first @ ..0x80 => (u32::from(first), 1),
        first @ ..0xe0 => (u32::from(first & 0x1f) << 6 | low(1), 2),
        first @ ..0xf0 => (u32::from(first & 0x0f) << 12 | low(1) << 6 | low(2), 3),
        first => (u32::from(first & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3), 4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_what_they_are() {
        let cases = [
            ('a', LETTER),
            ('é', LETTER),
            ('中', LETTER | IDEOGRAPH),
            ('7', NUMBER | DIGIT),
            ('½', NUMBER | DIGIT),
            (' ', SPACE),
            ('\n', SPACE),
            ('\u{a0}', SPACE),
            ('\u{301}', MARK | UNSTABLE),
            ('$', SYMBOL),
            ('。', SYMBOL),
            ('・', SYMBOL | IDEOGRAPH),
            ('\u{1}', 0),
            ('\u{212b}', LETTER | UNSTABLE),
            ('\u{1161}', LETTER | UNSTABLE),
        ];
        for (character, flags) in cases {
            assert_eq!(classes()[character as usize], flags, "{character:?}");
        }
    }

    #[test]
    fn every_character_is_decoded() {
        for character in ['\0', 'a', '\u{7f}', '\u{80}', 'é', '\u{800}', '中', '\u{ffff}', '😀', char::MAX]
        {
            let text = format!("x{character}y");
            assert_eq!(decode(text.as_bytes(), 1), (character.into(), character.len_utf8()));
        }
    }
}
