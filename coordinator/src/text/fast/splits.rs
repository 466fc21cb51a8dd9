//! Splits text into the words that are merged each by itself, as the models' expressions do, without an expression
//! engine.
//!
//! Each function here is one expression written out: its alternatives in their order, at a position from which it can
//! match. [`Splits::of`] knows which expressions those are; whatever it does not know is not split here.

use serde_json::Value;

use super::{
    super::ggml::{DEEPSEEK_V3, LLAMA3, QWEN2},
    classes::{DIGIT, IDEOGRAPH, LETTER, MARK, NUMBER, SPACE, SYMBOL, classes, decode},
};

/// How a family of models splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Splits {
    Gpt2,
    /// Every digit on its own, then as GPT-2.
    Smollm,
    /// LLaMA 3, and Qwen with one digit at a time.
    Llama3 {
        digits: usize,
    },
    /// DeepSeek V3: numbers, then ideographs, then the rest.
    DeepseekV3,
}

impl Splits {
    /// From the pre-tokeniser of a `tokenizer.json`; `None` for one that is not known here.
    pub(super) fn of(pre_tokenizer: &Value) -> Option<Self> {
        let steps = match pre_tokenizer["type"].as_str()? {
            "Sequence" => pre_tokenizer["pretokenizers"].as_array()?.as_slice(),
            _ => std::slice::from_ref(pre_tokenizer),
        };
        let (last, before) = steps.split_last()?;
        // Adds no space, and splits by GPT-2's expression or not at all.
        if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
            return None;
        }
        let by_words = last["use_regex"].as_bool()?;
        let digits = |step: &Value| {
            (step["type"] == "Digits" && step["individual_digits"] == true).then_some("digits")
        };
        let step = |step: &Value| digits(step).map(str::to_owned).or_else(|| expression(step));
        let before: Vec<String> = before.iter().map(step).collect::<Option<_>>()?;
        let before: Vec<&str> = before.iter().map(String::as_str).collect();
        match (before.as_slice(), by_words) {
            ([], true) => Some(Self::Gpt2),
            (["digits"], true) => Some(Self::Smollm),
            ([LLAMA3], false) => Some(Self::Llama3 { digits: 3 }),
            ([QWEN2], false) => Some(Self::Llama3 { digits: 1 }),
            (steps, false) if steps == DEEPSEEK_V3 => Some(Self::DeepseekV3),
            _ => None,
        }
    }

    /// Calls `word` with start and end of each word, in order; together they are the whole text.
    pub(super) fn each(self, text: &str, mut word: impl FnMut(usize, usize)) {
        let whole = Part { bytes: text.as_bytes(), classes: classes() };
        match self {
            Self::Gpt2 => whole.each(0, Part::gpt2, &mut word),
            Self::Smollm => whole.each_of_smollm(&mut word),
            Self::Llama3 { digits } => whole.each(0, |part, at| part.llama3(at, digits), &mut word),
            Self::DeepseekV3 => whole.each_of_deepseek(&mut word),
        }
    }
}

/// The expression of a step that makes each match a word, with `\r` and `\n` spelt out.
fn expression(step: &Value) -> Option<String> {
    let plain = step["type"] == "Split" && step["behavior"] == "Isolated" && step["invert"] == false;
    let expression = step["pattern"]["Regex"].as_str().filter(|_| plain)?;
    Some(expression.replace('\r', r"\r").replace('\n', r"\n"))
}

/// Text between two places beyond which no expression looks.
#[derive(Clone, Copy)]
struct Part<'a> {
    /// Valid UTF-8.
    bytes: &'a [u8],
    classes: &'static [u8],
}

impl Part<'_> {
    /// Cuts this part, which begins at `offset` of the text, by `end_of_word`.
    fn each(
        self,
        offset: usize,
        end_of_word: impl Fn(Self, usize) -> usize,
        word: &mut impl FnMut(usize, usize),
    ) {
        let mut at = 0;
        while at < self.bytes.len() {
            let end = end_of_word(self, at);
            word(offset + at, offset + end);
            at = end;
        }
    }

    fn each_of_smollm(self, word: &mut impl FnMut(usize, usize)) {
        let mut at = 0;
        while at < self.bytes.len() {
            let end = self.run_without_digits(at, DIGIT);
            Part { bytes: &self.bytes[at..end], ..self }.each(at, Part::gpt2, word);
            at = end;
            if at < self.bytes.len() {
                let (_, length) = self.at(at);
                word(at, at + length);
                at += length;
            }
        }
    }

    fn each_of_deepseek(self, word: &mut impl FnMut(usize, usize)) {
        let mut at = 0;
        while at < self.bytes.len() {
            let (class, length) = self.at(at);
            if class & NUMBER != 0 {
                let end = self.numbers(at + length, 2);
                word(at, end);
                at = end;
                continue;
            }
            let end = match class & IDEOGRAPH != 0 {
                true => self.run(at, IDEOGRAPH),
                false => self.run_without_digits(at, NUMBER | IDEOGRAPH),
            };
            Part { bytes: &self.bytes[at..end], ..self }.each(at, Part::deepseek, word);
            at = end;
        }
    }

    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    fn gpt2(self, at: usize) -> usize {
        let first = self.bytes[at];
        if first == b'\''
            && let Some(length) = self.contraction(at + 1, |byte| byte)
        {
            return at + 1 + length;
        }
        let begin = at + usize::from(first == b' ');
        let (class, length) = self.at(begin);
        if class & LETTER != 0 {
            self.letters(begin + length, LETTER)
        } else if class & NUMBER != 0 {
            self.run(begin + length, NUMBER)
        } else if class & SPACE == 0 && length > 0 {
            self.run_without(begin + length, SPACE | LETTER | NUMBER)
        } else {
            self.spaces(at, self.run(at, SPACE))
        }
    }

    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    fn llama3(self, at: usize, digits: usize) -> usize {
        let first = self.bytes[at];
        let (class, length) = self.at(at);
        let next = at + length;
        if class & LETTER != 0 {
            return self.letters(next, LETTER);
        }
        if class & NUMBER != 0 {
            return self.numbers(next, digits - 1);
        }
        if first == b'\''
            && let Some(length) = self.contraction(next, |byte| byte.to_ascii_lowercase())
        {
            return next + length;
        }
        let (following, length) = self.at(next);
        if following & LETTER != 0 && !is_line_end(first) {
            return self.letters(next + length, LETTER);
        }
        const NOT_SYMBOLS: u8 = SPACE | LETTER | NUMBER;
        if class & SPACE == 0 {
            return self.line_ends(self.run_without(next, NOT_SYMBOLS));
        }
        if first == b' ' && length > 0 && following & NOT_SYMBOLS == 0 {
            return self.line_ends(self.run_without(next, NOT_SYMBOLS));
        }
        self.lines_or_spaces(at)
    }

    /// ``[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|
    /// \s*[\r\n]+|\s+(?!\S)|\s+``
    fn deepseek(self, at: usize) -> usize {
        let first = self.bytes[at];
        let (class, length) = self.at(at);
        let next = at + length;
        if first.is_ascii_punctuation() && self.bytes.get(next).is_some_and(u8::is_ascii_alphabetic) {
            let letters = self.bytes[next..].iter().take_while(|byte| byte.is_ascii_alphabetic());
            return next + letters.count();
        }
        const WORD: u8 = LETTER | MARK;
        if class & WORD != 0 {
            return self.letters(next, WORD);
        }
        let (following, length) = self.at(next);
        if following & WORD != 0 && class & SYMBOL == 0 && !is_line_end(first) {
            return self.letters(next + length, WORD);
        }
        if class & SYMBOL != 0 || first == b' ' && following & SYMBOL != 0 {
            return self.line_ends(self.run(next, SYMBOL));
        }
        if class & SPACE != 0 {
            return self.lines_or_spaces(at);
        }
        // What matches nothing is a word up to where something matches.
        let mut end = next;
        while end < self.bytes.len() {
            let (class, length) = self.at(end);
            let (following, _) = self.at(end + length);
            if class & (WORD | SYMBOL | SPACE) != 0 || following & WORD != 0 {
                break;
            }
            end += length;
        }
        end
    }

    /// `\s*[\r\n]+|\s+(?!\S)|\s+`, where there is at least one space.
    fn lines_or_spaces(self, at: usize) -> usize {
        let end = self.run(at, SPACE);
        match self.bytes[at..end].iter().rposition(|&byte| is_line_end(byte)) {
            Some(last) => at + last + 1,
            None => self.spaces(at, end),
        }
    }

    /// `\s+(?!\S)|\s+`, of the spaces up to `end`: one is left to the word that follows, if there are several.
    fn spaces(self, at: usize, end: usize) -> usize {
        if end == self.bytes.len() {
            return end;
        }
        let last = self.bytes[at..end].iter().rposition(|&byte| byte & 0xc0 != 0x80).unwrap_or(0);
        if last == 0 { end } else { at + last }
    }

    /// `[\r\n]*`
    fn line_ends(self, at: usize) -> usize {
        at + self.bytes[at..].iter().take_while(|&&byte| is_line_end(byte)).count()
    }

    /// `\p{N}{0,most}`
    fn numbers(self, mut at: usize, most: usize) -> usize {
        for _ in 0..most {
            match self.at(at) {
                (class, length) if class & NUMBER != 0 => at += length,
                _ => break,
            }
        }
        at
    }

    /// What an apostrophe before `at` shortens; its length. Without case where `fold` takes it away, and then the long s
    /// is an s, too.
    fn contraction(self, at: usize, fold: impl Fn(u8) -> u8) -> Option<usize> {
        let byte = |at: usize| self.bytes.get(at).map_or(0, |&byte| fold(byte));
        match (byte(at), byte(at + 1)) {
            (b's' | b't' | b'm' | b'd', _) => Some(1),
            (b'r', b'e') | (b'v', b'e') | (b'l', b'l') => Some(2),
            _ if fold(b'S') == b's' && self.bytes[at..].starts_with("ſ".as_bytes()) => Some(2),
            _ => None,
        }
    }

    /// Class and length of the character there; nothing behind the end.
    #[inline(always)]
    fn at(self, at: usize) -> (u8, usize) {
        match self.bytes.get(at) {
            None => (0, 0),
            Some(&byte) if byte.is_ascii() => (self.classes[usize::from(byte)], 1),
            Some(_) => {
                let (code, length) = decode(self.bytes, at);
                (self.classes[code as usize], length)
            }
        }
    }

    /// The end of the characters that are any of these, letters among them: of ASCII eight at a time, so that how long a word
    /// is costs no wrong guess.
    #[inline]
    fn letters(self, mut at: usize, any: u8) -> usize {
        if self.is_ascii(at) {
            while let Some(eight) = self.eight(at) {
                let count = leading(!letter_bits(eight));
                at += count;
                if count < 8 {
                    break;
                }
            }
        }
        self.run(at, any)
    }

    /// The end of the characters that are none of these, digits among them: what is no digit of ASCII eight bytes at a time.
    #[inline]
    fn run_without_digits(self, mut at: usize, none: u8) -> usize {
        loop {
            while let Some(eight) = self.eight(at).filter(|_| self.is_ascii(at)) {
                let count = leading(digit_bits(eight) | eight);
                at += count;
                if count < 8 {
                    break;
                }
            }
            let (class, length) = self.at(at);
            if class & none != 0 || length == 0 {
                return at;
            }
            at += length;
        }
    }

    #[inline]
    fn is_ascii(self, at: usize) -> bool {
        self.bytes.get(at).is_some_and(u8::is_ascii)
    }

    /// Eight bytes from there on, the first the lowest.
    #[inline]
    fn eight(self, at: usize) -> Option<u64> {
        self.bytes.get(at..)?.first_chunk().map(|eight| u64::from_le_bytes(*eight))
    }

    /// The end of the characters that are any of these.
    #[inline]
    fn run(self, mut at: usize, any: u8) -> usize {
        loop {
            let (class, length) = self.at(at);
            if class & any == 0 {
                return at;
            }
            at += length;
        }
    }

    /// The end of the characters that are none of these.
    #[inline]
    fn run_without(self, mut at: usize, none: u8) -> usize {
        loop {
            let (class, length) = self.at(at);
            if class & none != 0 || length == 0 {
                return at;
            }
            at += length;
        }
    }
}

/// Each byte's lowest bit, and its highest.
const EACH: u64 = u64::MAX / 0xff;
const HIGH: u64 = EACH << 7;

/// Of eight bytes, the highest bits of those that are letters of ASCII.
#[inline]
fn letter_bits(bytes: u64) -> u64 {
    within(bytes | EACH << 5, b'a', b'z') & !bytes & HIGH
}

/// And of those that are digits.
#[inline]
fn digit_bits(bytes: u64) -> u64 {
    within(bytes, b'0', b'9') & !bytes & HIGH
}

/// The highest bits of bytes within this, but for what their own highest bits make of them: those are left out, so that no sum
/// reaches the next byte.
#[inline]
fn within(bytes: u64, first: u8, last: u8) -> u64 {
    let low = bytes & !HIGH;
    let from_first = low + EACH * u64::from(0x80 - first);
    let beyond_last = low + EACH * u64::from(0x7f - last);
    from_first & !beyond_last
}

/// How many of eight bytes, from the lowest on, have no highest bit.
#[inline]
fn leading(bytes: u64) -> usize {
    (bytes & HIGH).trailing_zeros() as usize / 8
}

fn is_line_end(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bytes_are_told_as_each_of_them_is() {
        for place in 0..8 {
            for byte in 0..=u8::MAX {
                for other in [b'a', b'Z', b'5', b' ', b'@', 0, 0x80, 0xff] {
                    let mut eight = [other; 8];
                    eight[place] = byte;
                    let bytes = u64::from_le_bytes(eight);
                    let count = |is: fn(&u8) -> bool| eight.iter().take_while(|byte| is(byte)).count();
                    assert_eq!(leading(!letter_bits(bytes)), count(u8::is_ascii_alphabetic), "{eight:?}");
                    let plain = count(|byte| byte.is_ascii() && !byte.is_ascii_digit());
                    assert_eq!(leading(digit_bits(bytes) | bytes), plain, "{eight:?}");
                }
            }
        }
    }
}
