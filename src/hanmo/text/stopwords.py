"""Function words of English and Chinese: pronouns, prepositions, conjunctions, auxiliaries, particles, measure words.

Negations (not, no, never, 不, 没) are left out on purpose: they turn the meaning of a sentence round, and a model of
opinions needs them. Chinese words are given in simplified and traditional script.
"""

from __future__ import annotations

ENGLISH = """
a an the this that these those such same other another each every either both all any some several few many much more
most less least enough own one ones i me my mine myself you your yours yourself yourselves he him his himself she her
hers herself it its itself we us our ours ourselves they them their theirs themselves who whom whose which what
whatever whichever whoever someone somebody something anyone anybody anything everyone everybody everything oneself am
is are was were be been being do does did doing done have has had having will would shall should can could may might
must ought let lets used i'm you're he's she's it's we're they're that's there's here's what's who's where's how's
i've you've we've they've i'd you'd he'd she'd it'd we'd they'd i'll you'll he'll she'll it'll we'll they'll let's
about above across after against along alongside amid among amongst around as at before behind below beneath beside
besides between beyond by concerning despite down during except for from in inside into like near of off on onto
opposite out outside over past per regarding round since than through throughout till to toward towards under
underneath until unto up upon versus via with within without and but or so yet if unless whether because although
though while whereas when whenever where wherever why how however therefore thus hence moreover furthermore
nevertheless nonetheless otherwise meanwhile instead also too then there here now once again ever always often
sometimes usually already still just only even almost quite rather very really perhaps maybe else away back further
soon later ago yes oh well etc e.g. i.e. mr mrs ms dr s t d ll m re ve
"""

CHINESE = """
的 地 得 了 着 著 过 過 之 所 等 等等 者 们 們 吗 嗎 呢 吧 啊 呀 哇 哦 喔 噢 哪 嘛 啦 喽 嘍 罢了 罷了 而已 似的 也好
与否 與否 我 你 您 他 她 它 我们 我們 你们 你們 您们 他们 他們 她们 她們 它们 它們 咱 咱们 咱們 俺 自己 本人 本身 自身
大家 大家伙 彼此 人家 别人 別人 他人 旁人 各自 其 其他 其它 其余 其餘 其中 其实 其實 某 某些 某个 某個 有些 有人 这 這
那 此 该 該 本 这个 這個 那个 那個 这些 這些 那些 这样 這樣 那样 那樣 这么 這麼 那么 那麼 这里 這裡 這裏 那里 那裡
那裏 这儿 這兒 那儿 那兒 这边 這邊 那边 那邊 这种 這種 那种 那種 此处 此處 此时 此時 这时 這時 那时 那時 如此 这次
這次 那次 谁 誰 什么 什麼 甚么 甚麼 哪个 哪個 哪些 哪里 哪裡 哪裏 哪儿 哪兒 怎 怎么 怎麼 怎样 怎樣 怎么样 怎麼樣 如何
为何 為何 为什么 為什麼 几 幾 多少 何 何时 何時 何处 何處 任何 一切 所有 各 各种 各種 各个 各個 每 每个 每個 每次 凡
凡是 另 另外 全部 整个 整個 在 于 於 从 從 自 自从 自從 由 由于 由於 向 往 朝 对 對 对于 對於 关于 關於 至于 至於 给
給 跟 同 和 与 與 及 以及 并 並 并且 並且 而 而且 或 或者 或是 还是 還是 把 被 将 將 让 讓 叫 使 令 为 為 为了 為了 因
因为 因為 因此 因而 所以 以 以便 以至 以致 用 按 按照 依 依照 据 據 根据 根據 通过 通過 经 經 经过 經過 随着 隨著 沿着
沿著 顺着 順著 除了 除 除此之外 比 比如 例如 譬如 像 如 如同 正如 当 當 当时 當時 趁 到 到底 直到 凭 憑 论 論 就是 即
即使 即便 既 既然 虽 雖 虽然 雖然 尽管 儘管 但 但是 可是 不过 不過 然而 却 卻 只是 只有 只要 只 仅 僅 仅仅 僅僅 如果
假如 要是 若 倘若 假使 的话 的話 否则 否則 不然 那末 于是 於是 然后 然後 接着 接著 此外 总之 總之 总而言之
總而言之 换句话说 換句話說 也就是说 也就是說 甚至 何况 何況 况且 況且 反而 反之 不但 不仅 不僅 不光 不管 不论 不論
无论 無論 宁可 寧可 与其 與其 乃 乃至 则 則 且 以免 免得 与此同时 與此同時 同时 同時 是 有 会 會 能 能够 能夠 可 可以
可能 应 應 应该 應該 应当 應當 要 需要 得以 必须 必須 须 須 想 愿 愿意 願意 肯 敢 来 來 去 起来 起來 出来 出來 下来
下來 下去 上来 上來 上去 进来 進來 进去 進去 过来 過來 过去 過去 出去 回来 回來 回去 也 都 就 才 又 再 还 還 更 最 很
太 挺 极 極 极其 極其 非常 十分 相当 相當 比较 比較 较 較 稍 稍微 有点 有點 几乎 幾乎 差不多 大约 大約 大概 大致 左右
上下 约 約 已 已经 已經 曾 曾经 曾經 正 正在 刚 剛 刚刚 剛剛 刚才 剛才 将要 將要 即将 即將 便 立即 立刻 马上 馬上 终于
終於 一直 一向 总 總 总是 總是 常 常常 经常 經常 时常 時常 往往 有时 有時 偶尔 偶爾 渐渐 漸漸 逐渐 逐漸 仍 仍然 仍旧
仍舊 依然 依旧 依舊 究竟 毕竟 畢竟 果然 居然 竟 竟然 原来 原來 本来 本來 其次 首先 最后 最後 一样 一樣 一般 一起 一同
一共 共 全 均 皆 俱 尤其 特别 特別 恰好 正好 也许 也許 或许 或許 似乎 好像 仿佛 当然 當然 确实 確實 的确 的確
实在 實在 真 真是 简直 簡直 几时 幾時 随 隨 随时 隨時 随后 隨後 个 個 些 种 種 位 件 条 條 隻 张 張 次 回 遍 下 点 點
点儿 點兒 一 一个 一個 一些 一种 一種 一次 一下 一点 一點 两 兩 第 第一 上 中 里 裡 裏 内 內 外 前 后 後 间 間 旁 边
邊 之前 之后 之後 之间 之間 之中 之一 之内 之內 以前 以后 以後 以上 以下 以来 以來 以内 以內 以外 上面 下面 里面 裡面
裏面 外面 前面 后面 後面 中间 中間 时 時 时候 時候 方面 喂 嗯 哎 唉 哈 哈哈 嘿 呵 呵呵 哼 嗨 喂喂
"""
